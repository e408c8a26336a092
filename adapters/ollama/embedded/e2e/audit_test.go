package e2e

import (
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/audit/live"
	"github.com/kvshield/kvshield/audit/memory"
)

// Of the demo model.
const (
	demoLayers  = 5
	demoHeadsKV = 2
)

const letter = "My dear sister, I have to tell you what the doctor said on Tuesday: the scan shows what we feared. I have told nobody yet, " +
	"neither Henry nor the company. The money lies at the Harbour Bank; half of it is yours, the other half is for the lifeboat station."

// audited is a server whose runners may be looked into, as in `kvshield audit`: the test has the session socket.
type audited struct {
	*server
	shield *supervisor.Supervisor
}

// startAudited runs kvshield-ollama in a mode; off is its engine as it is.
func startAudited(t *testing.T, mode string, env ...string) *audited {
	t.Helper()
	args := []string{"--tee", "software"}
	if mode == "resident" {
		args = append(args, "--mode", "resident")
	}
	s, err := supervisor.New(context.WithoutCancel(t.Context()), supervisor.Config{
		Enclave: root + "/bin/kvshield-enclave", Args: args, Directory: home, Log: slog.New(slog.DiscardHandler),
		Audit: true, Observe: mode == "off", Resident: mode == "resident", Scrub: mode == "resident"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return &audited{start(t, shielded, append([]string{"KVSHIELD_SOCKET=" + s.Socket()}, env...)...), s}
}

// converse says something and returns all tokens that are cached then.
func (s *server) converse(t *testing.T) []int32 {
	t.Helper()
	answer, err := s.post("/api/generate", object{"model": "demo", "prompt": letter, "stream": false, "options": object{"num_predict": 40, "num_ctx": 1024}})
	if err != nil {
		t.Fatalf("%v\n%s", err, s.log)
	}
	var a struct{ Context []int32 }
	if err := json.Unmarshal([]byte(answer), &a); err != nil || len(a.Context) < 100 {
		t.Fatalf("%d tokens, %v", len(a.Context), err)
	}
	const start = 1 // the token with which a conversation begins, which Ollama leaves out
	return append([]int32{start}, a.Context...)
}

// runner is the process in which the model runs.
func (s *server) runner(t *testing.T) int {
	t.Helper()
	for name, pids := range children(t, s.cmd.Process.Pid) {
		if name != enclaveName && len(pids) == 1 {
			return pids[0]
		}
	}
	t.Fatalf("no runner\n%s", s.log)
	return 0
}

func (s *audited) dump(t *testing.T) *live.Dump {
	t.Helper()
	type answer struct {
		d   *live.Dump
		err error
	}
	answered := make(chan answer, 1)
	go func() {
		f, err := s.shield.Dump(t.Context(), s.runner(t))
		if err != nil {
			answered <- answer{nil, err}
			return
		}
		defer f.Close()
		d, err := live.Read(f)
		answered <- answer{d, err}
	}()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		s.converse(t) // the same again: only its last token is computed, and the cache keeps its order
		select {
		case a := <-answered:
			if a.err != nil {
				t.Fatal(a.err)
			}
			return a.d
		default:
		}
	}
	t.Fatal("no dump")
	return nil
}

// public is what anybody computes from the public model: layer 0's values for each token, taken here from a run in the clear.
type public struct {
	values audit.Matrix
	truth  []int32 // which of them each token of the conversation has
}

func newPublic(t *testing.T, d *live.Dump, said []int32) (*audit.Snapshot, public) {
	t.Helper()
	s, err := d.Snapshot(demoLayers, demoHeadsKV)
	if err != nil {
		t.Fatal(err)
	}
	n := min(s.Tokens(), len(said))
	if n < len(said)-1 {
		t.Fatalf("the cache holds %d tokens, %d were said", s.Tokens(), len(said))
	}
	s = s.First(n)
	var p public
	var known []int32
	for i, token := range said[:n] {
		at := slices.Index(known, token)
		if at < 0 {
			at, known = len(known), append(known, token)
			p.values.Data = append(p.values.Data, s.Layers[0].V.Row(i)...)
		}
		p.truth = append(p.truth, int32(at))
	}
	p.values.Rows, p.values.Cols = len(known), s.Layers[0].V.Cols
	return s, p
}

// recovered is how much an attack of kvshield's audit gets out of a cache.
func (p public) recovered(t *testing.T, key string, s *audit.Snapshot) float64 {
	t.Helper()
	for _, a := range audit.Attacks() {
		if a.Key == key {
			o, err := audit.Evaluate(t.Context(), a, &audit.Case{Snapshot: s, Truth: p.truth, Public: &audit.Public{HeadsKV: demoHeadsKV, V: p.values}})
			if err != nil {
				t.Fatal(err)
			}
			return o.Score.Rate
		}
	}
	t.Fatalf("no attack %q", key)
	return 0
}

// scanned is the longest run of the conversation's values in a process's memory.
func (p public) scanned(t *testing.T, pid int) int {
	t.Helper()
	s := memory.NewScanner(p.values)
	hits, err := s.Process(t.Context(), pid)
	if err != nil {
		t.Fatal(err)
	}
	longest := 0
	for _, run := range s.Runs(hits) {
		longest = max(longest, len(run.Tokens))
	}
	return longest
}

// The verdicts are those on llama-server: a cache in the clear gives all away; a permuted one nothing to whoever does not expect it,
// all to whoever does; in mode resident there is nothing, and none of it is in the runner's memory.
func TestAudit(t *testing.T) {
	for _, name := range []string{"llama.cpp", "Ollama's engine", "Ollama's engine, flash"} {
		t.Run(name, func(t *testing.T) {
			env := ways[name].env
			plain := startAudited(t, "off", env...)
			said := plain.converse(t)
			clear, p := newPublic(t, plain.dump(t), said)
			for _, attack := range []string{"naive-values", "sorted-values"} {
				if rate := p.recovered(t, attack, clear); rate < 0.98 {
					t.Errorf("off: %s recovers %.3f", attack, rate)
				}
			}
			unshielded := start(t, stock, env...)
			unshielded.converse(t)
			for what, pid := range map[string]int{"stock": unshielded.runner(t), "off": plain.runner(t)} {
				// Values of the Go engine without flash attention are cached by float, not by token: no row of them lies together.
				if run := p.scanned(t, pid); run < 100 && name != "Ollama's engine" {
					t.Errorf("%s: only %d rows in a row in the runner's memory", what, run)
				}
			}

			permuted := startAudited(t, "permute", env...)
			permuted.converse(t)
			s, err := permuted.dump(t).Snapshot(demoLayers, demoHeadsKV)
			if err != nil {
				t.Fatal(err)
			}
			s = s.First(min(s.Tokens(), len(p.truth)))
			if rate := p.recovered(t, "naive-values", s); rate > 0.1 {
				t.Errorf("permute: naive-values recovers %.3f", rate)
			}
			if rate := p.recovered(t, "sorted-values", s); rate < 0.98 {
				t.Errorf("permute: sorted-values recovers %.3f: the audit does not see what is there", rate)
			}
			if run := p.scanned(t, permuted.runner(t)); run >= 8 {
				t.Errorf("permute: %d rows in a row in the runner's memory", run)
			}

			resident := startAudited(t, "resident", env...)
			resident.converse(t)
			if bytes, zero := resident.dump(t).Zero(); !zero {
				t.Errorf("resident: the cache of %d bytes is not zero", bytes)
			}
			if run := p.scanned(t, resident.runner(t)); run >= 8 {
				t.Errorf("resident: %d rows in a row in the runner's memory", run)
			}
		})
	}
}
