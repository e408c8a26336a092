package e2e

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/hooks/session"
)

// watched is a supervisor of this process, whose counts can be looked at.
func watched(t *testing.T, mode string, transport session.Transport) *supervisor.Supervisor {
	t.Helper()
	s, err := supervisor.New(t.Context(), supervisor.Config{Hook: filepath.Join(root, "bin", "libkvshield.so"), Enclave: filepath.Join(root, "bin", "kvshield-enclave"),
		Args: []string{"--tee", "software", "--mode", mode}, Resident: mode == "resident", Transport: transport, Directory: shortDir(t), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// supervised is a llama-server under such a supervisor.
func supervised(t *testing.T, mode string, transport session.Transport, args ...string) (*supervisor.Supervisor, *server) {
	t.Helper()
	s := watched(t, mode, transport)
	socket := filepath.Join(shortDir(t), "engine.sock")
	engine, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: engine("llama-server"), Model: demoModel, Socket: socket, Args: args, Env: s.Environment(os.Environ())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(engine.Stop)
	if err := engine.WaitHealthy(t.Context()); err != nil {
		t.Fatal(err)
	}
	client := httpClient(t)
	client.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return engine.Dial(ctx) }
	return s, &server{url: "http://localhost", client: client, log: &buffer{}}
}

// askSlots asks one thing of each slot at the same time and returns the tokens that the engine says it computed in it: all
// but the last that was sampled, which nobody saw computed.
func (s *server) askSlots(t *testing.T, texts []string, n int) []int {
	t.Helper()
	want := make([]int, len(texts))
	var wg sync.WaitGroup
	for slot, text := range texts {
		wg.Go(func() {
			body, err := s.post("/completion", map[string]any{"prompt": text, "n_predict": n + slot, "temperature": 0, "ignore_eos": true, "id_slot": slot})
			var c struct {
				Slot    int `json:"id_slot"`
				Timings struct {
					Prompt    int `json:"prompt_n"`
					Predicted int `json:"predicted_n"`
				}
			}
			if err == nil {
				err = json.Unmarshal(body, &c)
			}
			if err != nil || c.Slot != slot {
				t.Errorf("slot %d: %+v, %v", slot, c, err)
			}
			want[slot] = c.Timings.Prompt + c.Timings.Predicted - 1
		})
	}
	wg.Wait()
	return want
}

// The hook says for each graph which slot's tokens it computed, and that is what the engine itself counts: with slots that have
// a stream of cells each, with one for all, in batches that are cut into several graphs, in both transports.
func TestGraphsBelongToTheirSlots(t *testing.T) {
	for name, test := range map[string]struct {
		mode      string
		transport session.Transport
		args      []string
	}{
		"resident, streams":          {"resident", session.SharedMemory, []string{"--no-kv-unified"}},
		"resident, one stream":       {"resident", session.SharedMemory, []string{"--kv-unified"}},
		"permute, streams, socket":   {"permute", session.Socket, []string{"--no-kv-unified"}},
		"permute, one stream, no fa": {"permute", session.SharedMemory, []string{"--kv-unified", "-fa", "off"}},
		"resident, streams, no fa":   {"resident", session.Socket, []string{"--no-kv-unified", "-fa", "off"}},
	} {
		t.Run(name, func(t *testing.T) {
			s, engine := supervised(t, test.mode, test.transport, append([]string{"-np", "3", "-c", "3072", "-b", "256", "-ub", "64"}, test.args...)...)
			s.Graphs() // of the engine's start
			before := s.Totals()
			long := prose(t)
			want := engine.askSlots(t, []string{"At last", long[:700], long[700:1500]}, 20)
			graphs, after := s.Graphs(), s.Totals()
			checkGraphs(t, graphs, want)
			sum := meter.Totals{}
			for _, g := range graphs {
				sum.Transitions += uint64(g.Transitions)
				sum.Bytes += g.Bytes
				sum.Wait += g.Wait
				sum.Enclave += g.Enclave
			}
			if sum.Transitions != after.Transitions-before.Transitions || sum.Bytes != after.Bytes-before.Bytes || sum.Wait != after.Wait-before.Wait || sum.Enclave != after.Enclave-before.Enclave || sum.Enclave == 0 || sum.Enclave >= sum.Wait {
				t.Errorf("the graphs together %+v, counted %+v more than %+v", sum, after, before)
			}
			if layers := s.Layers(); len(layers) != 5 || layers[4].Transitions == 0 {
				t.Errorf("layers %+v", layers)
			}
		})
	}
}

func checkGraphs(t *testing.T, graphs []meter.Graph, want []int) {
	t.Helper()
	got, together := map[int]int{}, 0
	for _, g := range graphs {
		if g.Transitions == 0 {
			continue
		}
		tokens := 0
		for _, p := range g.Parts {
			got[p.Sequence] += p.Tokens
			tokens += p.Tokens
		}
		if tokens != g.Tokens || g.End < g.Start || g.Wait > g.End-g.Start || g.Transitions < 5 {
			t.Errorf("graph %+v", g)
		}
		if len(g.Parts) > 1 {
			together++
		}
	}
	for slot, n := range want {
		if got[slot] != n {
			t.Errorf("slot %d: %d tokens by the hook, %d by the engine", slot, got[slot], n)
		}
	}
	if together == 0 || len(got) != len(want) {
		t.Errorf("%d graphs of several slots, slots %v", together, got)
	}
}

// Engines until 2026 take their batches by value: they are looked at without being understood.
func TestGraphsOfAnOlderEngineNameTheSequence(t *testing.T) {
	s := watched(t, "resident", session.SharedMemory)
	s.Graphs()
	if out, said, err := run(t, s.Environment(os.Environ()), "node", filepath.Join(root, ".engine", "node", "complete.mjs"), demoModel, "The sea", "16"); err != nil || strings.TrimSpace(out) == "" {
		t.Fatalf("%v\n%s", err, said)
	}
	named := 0
	for _, g := range s.Graphs() {
		if len(g.Parts) == 1 && g.Parts[0].Sequence == 0 && g.Parts[0].Tokens == g.Tokens {
			named++
		}
	}
	if named < 16 {
		t.Errorf("%d graphs name their sequence", named)
	}
}
