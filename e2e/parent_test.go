package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/supervisor"
)

// parent is a program that starts llama-server as Ollama does, stock or under kvshield run.
type parent struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	answers *bufio.Scanner
	log     *buffer
	runtime string // below which kvshield run has its directory
	ended   chan error
}

type parentAnswer struct {
	OK        bool
	PID, Port int
	Error     string
}

var buildParent = sync.OnceValues(func() (string, error) {
	out := filepath.Join(buildDir, "parent")
	cmd := exec.Command("go", "build", "-o", out, "./e2e/testdata/parent")
	cmd.Dir = root
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, text)
	}
	return out, nil
})

// startParent starts it; an empty mode is a stock one.
func startParent(t *testing.T, mode string, env []string, flags ...string) *parent {
	t.Helper()
	program, err := buildParent()
	if err != nil {
		t.Fatal(err)
	}
	p := &parent{log: &buffer{}, runtime: shortDir(t), ended: make(chan error, 1)}
	p.cmd = exec.Command(program, engine("llama-server"))
	if mode != "" {
		args := append([]string{"run", "--mode", mode, "--runtime-dir", p.runtime}, flags...)
		p.cmd = exec.Command(kvshield, append(args, "--", program, engine("llama-server"))...)
	}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stderr = p.log
	out, err := p.cmd.StdoutPipe()
	if err == nil {
		p.in, err = p.cmd.StdinPipe()
	}
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	p.answers = bufio.NewScanner(out)
	t.Cleanup(func() { p.end(t) })
	if a := p.answer(t, "probes"); !a.OK { // those that it does first
		t.Fatalf("%s\n%s", a.Error, p.log)
	}
	return p
}

func (p *parent) answer(t *testing.T, what string) parentAnswer {
	t.Helper()
	var a parentAnswer
	if !p.answers.Scan() || json.Unmarshal(p.answers.Bytes(), &a) != nil {
		t.Fatalf("%s: no answer\n%s", what, p.log)
	}
	return a
}

func (p *parent) ask(t *testing.T, words ...string) parentAnswer {
	t.Helper()
	line := strings.Join(words, " ")
	fmt.Fprintln(p.in, line)
	return p.answer(t, line)
}

// load loads a model and returns its server.
func (p *parent) load(t *testing.T, name, model string, args ...string) *server {
	t.Helper()
	a := p.ask(t, append([]string{"load", name, model}, args...)...)
	if !a.OK {
		t.Fatalf("%s: %s\n%s", model, a.Error, p.log)
	}
	// A connection of its own for each request: one that the server has just given up is no answer to anything.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	return &server{url: fmt.Sprintf("http://127.0.0.1:%d", a.Port), client: client, log: p.log}
}

// end closes the parent's standard input, upon which it ends, and everything with it.
func (p *parent) end(t *testing.T) {
	t.Helper()
	p.in.Close()
	wait := make(chan error, 1)
	go func() { wait <- p.cmd.Wait() }()
	select {
	case <-wait:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		t.Errorf("the parent did not end\n%s", p.log)
	}
}

// models that the run says it has, by path.
func (p *parent) models() map[string]string {
	found := map[string]string{}
	for _, run := range supervisor.ReadStatuses(p.runtime) {
		for _, e := range run.Engines {
			for _, m := range e.Models {
				found[m.Path] = m.How
			}
		}
	}
	return found
}

func (p *parent) awaitModels(t *testing.T, want map[string]string) {
	t.Helper()
	eventually(t, func() string {
		if got := p.models(); fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Sprintf("models %v, want %v", got, want)
		}
		return ""
	})
}

var howIn = map[string]string{"resident": "resident", "permute": "permuted"}

// What an Ollama does in a day: two models at once, with requests in parallel; one is unloaded and comes back; one crashes.
func TestModelsOfAParentLikeOllama(t *testing.T) {
	other := quantised(t, "F32")
	models := []string{demoModel, other}
	env := []string{"OLLAMA_NUM_PARALLEL=2"}
	var want [][]completion
	stock := startParent(t, "", env)
	for i, model := range models {
		want = append(want, stock.load(t, fmt.Sprint(i), model).completeAll(t, tokens, 1, nil))
	}
	inEachMode(t, func(t *testing.T, mode string) {
		p := startParent(t, mode, env)
		both := map[string]string{demoModel: howIn[mode], other: howIn[mode]}
		servers := []*server{p.load(t, "0", demoModel), p.load(t, "1", other)}
		p.awaitModels(t, both)
		check := func() {
			t.Helper()
			got := make([][]completion, len(servers))
			var wg sync.WaitGroup
			for i, s := range servers {
				wg.Go(func() { got[i] = s.completeAll(t, tokens, 2, nil) })
			}
			wg.Wait()
			for i := range servers {
				same(t, want[i], got[i])
			}
		}
		check()
		for _, how := range []string{"term", "kill"} { // an unload, by either generation's signal, is a crash to us
			p.ask(t, "signal", "0", how)
			p.ask(t, "wait", "0")
			p.awaitModels(t, map[string]string{other: howIn[mode]})
			same(t, want[1][:1], []completion{servers[1].complete(t, prompts[0], tokens, nil)})
			servers[0] = p.load(t, "0", demoModel)
			p.awaitModels(t, both)
			check()
		}
		p.end(t)
		eventually(t, func() string { return p.left() })
	})
}

// left is what a run that has ended left behind.
func (p *parent) left() string {
	for pid, line := range processes(p.runtime) {
		return fmt.Sprintf("process %d: %s", pid, line)
	}
	dirs, _ := filepath.Glob(filepath.Join(p.runtime, "kvshield-*"))
	return strings.Join(dirs, " ")
}

func TestOllamaSettings(t *testing.T) {
	tests := map[string]struct {
		env   []string
		exact bool // else the cache rounds
		log   string
	}{
		"flash attention":     {[]string{"OLLAMA_FLASH_ATTENTION=1"}, true, "flash_attn = enabled"},
		"no flash attention":  {[]string{"OLLAMA_FLASH_ATTENTION=0"}, true, "flash_attn = disabled"},
		"context":             {[]string{"OLLAMA_CONTEXT_LENGTH=512"}, true, "n_ctx = 512"},
		"context, in halves":  {[]string{"OLLAMA_CONTEXT_LENGTH=512", "OLLAMA_NUM_PARALLEL=2"}, true, "n_ctx = 1024"},
		"quantised cache":     {[]string{"OLLAMA_KV_CACHE_TYPE=q8_0", "OLLAMA_FLASH_ATTENTION=1"}, false, "K (q8_0)"},
		"full precision, F16": {[]string{"OLLAMA_KV_CACHE_TYPE=f16"}, true, "K (f16)"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			stock := startParent(t, "", test.env)
			want := stock.load(t, "demo", demoModel).completeAll(t, tokens, 1, nil)
			inEachMode(t, func(t *testing.T, mode string) {
				p := startParent(t, mode, test.env)
				got := p.load(t, "demo", demoModel).completeAll(t, tokens, 1, nil)
				if test.exact {
					same(t, want, got)
				} else {
					agrees(t, want, got)
				}
				if !strings.Contains(strings.Join(strings.Fields(p.log.String()), " "), test.log) {
					t.Errorf("the engine does not say %q", test.log)
				}
			})
		})
	}
}

func TestParentWithDraftModel(t *testing.T) {
	draft := quantised(t, "Q8_0")
	args := []string{"--spec-type", "draft-simple", "--spec-draft-n-max", "4", "--spec-draft-model", draft}
	want := startParent(t, "", nil).load(t, "demo", demoModel).completeAll(t, tokens, 1, nil)
	inEachMode(t, func(t *testing.T, mode string) {
		p := startParent(t, mode, nil)
		got := p.load(t, "demo", demoModel, args...).completeAll(t, tokens, 1, nil)
		same(t, want, got)
		if got[0].Timings.DraftN == 0 {
			t.Error("nothing was drafted")
		}
		p.awaitModels(t, map[string]string{demoModel: howIn[mode], draft: howIn[mode]})
	})
}

func TestParentWithEmbeddingModel(t *testing.T) {
	model := tiny(t, "bert")
	ask := func(p *parent) []float64 {
		t.Helper()
		answer, err := p.load(t, "bert", model, embedding...).tryEmbed()
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}
	want := ask(startParent(t, "", nil))
	inEachMode(t, func(t *testing.T, mode string) {
		p := startParent(t, mode, nil)
		if got := ask(p); !slices.Equal(got, want) {
			t.Errorf("embeddings %v, want %v", got[:4], want[:4])
		}
		p.awaitModels(t, map[string]string{model: map[string]string{"resident": "resident", "permute": "passed"}[mode]})
	})
}

// The enclave is killed while two models answer: what their clients got is the beginning of the right text, both engines say why
// they end, and the next requests, for which a parent loads the models again at once, are answered.
func TestEnclaveKilledUnderTwoModels(t *testing.T) {
	stock := startParent(t, "", nil).load(t, "demo", demoModel)
	want := stock.completeAll(t, tokens, 1, nil)
	beginning := said(take(t, stock.stream(t), 2*tokens))
	inEachMode(t, func(t *testing.T, mode string) {
		p := startParent(t, mode, nil)
		var streams []chan string
		servers := []*server{p.load(t, "0", demoModel), p.load(t, "1", demoModel)}
		for _, s := range servers {
			streams = append(streams, s.stream(t))
		}
		before := [][]string{take(t, streams[0], 20), take(t, streams[1], 20)}
		enclave := children(t, p.cmd.Process.Pid)["kvshield-enclave"]
		if enclave == 0 {
			t.Fatal("no enclave")
		}
		if err := syscall.Kill(enclave, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for i, stream := range streams {
			beginsRight(t, beginning, said(append(before[i], take(t, stream, 10000)...)))
			if a := p.ask(t, "wait", fmt.Sprint(i)); !strings.Contains(a.Error, "the enclave process died") {
				t.Errorf("model %d: Ollama would show %q", i, a.Error)
			}
		}
		for _, name := range []string{"0", "1"} {
			same(t, want, p.load(t, name, demoModel).completeAll(t, tokens, 1, nil))
		}
	})
}

// A model that the mode cannot shield: what Ollama would tell its client, and what happens when its user allows it.
func TestRefusedModelOfAParent(t *testing.T) {
	model := tiny(t, "mamba")
	ask := map[string]any{"prompt": []int{5, 6, 7}}
	want := startParent(t, "", nil).load(t, "it", model).complete(t, "", 20, ask)

	inEachMode(t, func(t *testing.T, mode string) {
		p := startParent(t, mode, nil)
		a := p.ask(t, "load", "it", model)
		if a.OK || !strings.Contains(a.Error, "error: "+model+": ") || !strings.Contains(a.Error, "which no mode can shield") {
			t.Errorf("Ollama would show %q, want why it was refused", a.Error)
		}
		if strings.Contains(a.Error, "memory") {
			t.Errorf("Ollama would take %q for a lack of memory", a.Error)
		}

		p = startParent(t, mode, []string{"KVSHIELD_ALLOW_UNSHIELDED=/no/such.gguf," + model})
		if got := p.load(t, "it", model).complete(t, "", 20, ask); got.Content != want.Content {
			t.Errorf("allowed, it says %q, stock %q", got.Content, want.Content)
		}
		p.load(t, "demo", demoModel).complete(t, prompts[0], 20, nil)
		p.awaitModels(t, map[string]string{model: "clear", demoModel: howIn[mode]})
		if !strings.Contains(p.log.String(), "kvshield: "+model+" runs IN THE CLEAR") {
			t.Error("that it runs in the clear was not said")
		}
	})
}

// A process runs in the clear with all of its models or with none.
func TestDraftModelOfAnAllowedModel(t *testing.T) {
	draft := quantised(t, "Q8_0")
	args := []string{"--spec-type", "draft-simple", "--spec-draft-n-max", "4", "--spec-draft-model", draft}
	inEachMode(t, func(t *testing.T, mode string) {
		for _, allowed := range []string{demoModel, draft} {
			p := startParent(t, mode, nil, "--allow-unshielded", allowed)
			if a := p.ask(t, append([]string{"load", "demo", demoModel}, args...)...); a.OK || !strings.Contains(a.Error, "or none") {
				t.Errorf("%s allowed: loaded %v, Ollama would show %q", filepath.Base(allowed), a.OK, a.Error)
			}
		}
		p := startParent(t, mode, nil, "--allow-unshielded", demoModel, "--allow-unshielded", draft)
		p.load(t, "demo", demoModel, args...).complete(t, prompts[0], 20, nil)
		p.awaitModels(t, map[string]string{demoModel: "clear", draft: "clear"})
	})
}
