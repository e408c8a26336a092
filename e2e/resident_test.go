package e2e

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestResidentEqualsStock(t *testing.T) {
	for name, test := range map[string]struct {
		flags, args []string
		parallel    int
	}{
		"streams":          {nil, []string{"-np", "4", "-c", "4096", "--no-kv-unified"}, 4},
		"unified":          {nil, []string{"-np", "4", "-c", "4096", "--kv-unified"}, 4},
		"F32 cache":        {nil, []string{"-ctk", "f32", "-ctv", "f32"}, 1},
		"F32 storage":      {[]string{"--enclave-storage", "f32"}, nil, 1},
		"not scrubbed":     {[]string{"--scrub=false"}, nil, 1},
		"small batches":    {nil, []string{"-ub", "8", "-b", "16"}, 1},
		"streams, no fa":   {nil, []string{"-np", "4", "-c", "4096", "--no-kv-unified", "-fa", "off"}, 4},
		"frames of 16 KiB": {[]string{"--data-plane-bytes", "16384"}, []string{"-np", "2", "--no-kv-unified"}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			stock := startStock(t, demoModel, nil, test.args...)
			want := stock.completeAll(t, tokens, 1, nil)
			shielded := startShielded(t, serveOptions{model: demoModel, mode: "resident", flags: test.flags, args: test.args})
			same(t, want, shielded.completeAll(t, tokens, test.parallel, nil))
		})
	}
}

func TestResidentQuantisedStorage(t *testing.T) {
	want := startStock(t, demoModel, nil).completeAll(t, tokens, 1, nil)
	shielded := startShielded(t, serveOptions{model: demoModel, mode: "resident", flags: []string{"--enclave-storage", "q8_0"}})
	agrees(t, want, shielded.completeAll(t, tokens, 1, nil))
}

// prose is some 2,000 tokens of the demo model's.
func prose(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, "docs", "threat-model.md"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Repeat(string(b), 10)
}

// A conversation in three turns: each begins with what came before, the last one with another continuation.
func TestPrefixIsUsedAgain(t *testing.T) {
	start := prompts[0] + " " + prompts[1]
	turns := []string{start, start + " " + prompts[2], start + " " + prompts[3]}
	args := []string{"-np", "1"}
	more := map[string]any{"cache_prompt": true, "id_slot": 0}
	stock := startStock(t, demoModel, nil, args...)
	shielded := startShielded(t, serveOptions{model: demoModel, mode: "resident", args: args})
	for i, turn := range turns {
		want, got := stock.complete(t, turn, 40, more), shielded.complete(t, turn, 40, more)
		sameText(t, fmt.Sprintf("turn %d", i), want, got)
		if got.Timings.CacheN != want.Timings.CacheN || i > 0 && got.Timings.CacheN == 0 {
			t.Errorf("turn %d: %d tokens used again, stock %d", i, got.Timings.CacheN, want.Timings.CacheN)
		}
	}
}

// 2,000 tokens of context.
func TestLongContext(t *testing.T) {
	args := []string{"-np", "1", "-c", "4096"}
	stock := startStock(t, demoModel, nil, args...)
	shielded := startShielded(t, serveOptions{model: demoModel, mode: "resident", args: args})
	prompt := stock.firstTokens(t, prose(t), 1900)
	all := map[string]any{"n_probs": vocabulary}
	want, got := stock.complete(t, prompt, 100, all), shielded.complete(t, prompt, 100, all)
	if got.Timings.PromptN < 1800 {
		t.Errorf("the prompt has %d tokens", got.Timings.PromptN)
	}
	sameText(t, "the text", want, got)
	if d := distance(logits(t, want, 0), logits(t, got, 0)); d > 1e-3 {
		t.Errorf("logits of the first token differ by %.1e relative", d)
	}
}

func TestContextThatDoesNotFitIsRefused(t *testing.T) {
	began := time.Now()
	s := launch(t, serveOptions{model: demoModel, mode: "resident", flags: []string{"--enclave-memory", "1MiB", "-v"}, args: []string{"-c", "65536", "-fit", "off"}})
	err := s.wait(t)
	exit, ok := err.(*exec.ExitError)
	if !ok || exit.ExitCode() != 1 {
		t.Errorf("it ended with %v, want exit code 1", err)
	}
	if want := regexp.MustCompile(`the KV cache of this context needs \d+ MiB in the enclave, where 0 of 1 MiB are taken; use a smaller context`); !want.MatchString(s.log.String()) {
		t.Errorf("nobody says what is missing:\n%s", s.log)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v to say so", took)
	}
}

var perplexity = regexp.MustCompile(`Final estimate: PPL = ([0-9.]+)`)

// Perplexity over some thousand tokens, to four digits.
func TestPerplexityEqualsStock(t *testing.T) {
	program := engine("llama-perplexity")
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte(prose(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-m", demoModel, "-f", text, "-c", "512", "-t", "1", "--chunks", "8"}
	measure := func(name string, args ...string) float64 {
		for range 8 { // llama.cpp's programs lose the end of their output now and then
			out, errs, err := run(t, nil, name, args...)
			if err != nil {
				t.Fatalf("%s: %v\n%s", name, err, errs)
			}
			if found := perplexity.FindStringSubmatch(out + errs); found != nil {
				v, err := strconv.ParseFloat(found[1], 64)
				if err != nil {
					t.Fatal(err)
				}
				return v
			}
		}
		t.Fatalf("%s printed no estimate in 8 runs", name)
		return 0
	}
	want := measure(program, args...)
	got := measure(kvshield, append([]string{"run", "--mode", "resident", "--", "llama-perplexity"}, args...)...)
	t.Logf("perplexity: stock %v, resident %v", want, got)
	if math.Abs(got-want)/want > 1e-4 {
		t.Errorf("perplexity %v, stock %v", got, want)
	}
}

// Several answers to one prompt: the engine copies the prompt's sequence, within its cache or to another stream.
func TestSequenceIsCopied(t *testing.T) {
	for _, kind := range []string{"--kv-unified", "--no-kv-unified"} {
		t.Run(kind, func(t *testing.T) {
			args := []string{"-np", "4", "-c", "4096", kind}
			answers := func(s *server) []string {
				var a struct{ Choices []struct{ Text string } }
				b, err := s.post("/v1/completions", map[string]any{"prompt": prompts[1], "max_tokens": 40, "temperature": 0, "n": 3})
				if err == nil {
					err = json.Unmarshal(b, &a)
				}
				if err != nil || len(a.Choices) != 3 {
					t.Fatalf("%d answers: %v\n%s", len(a.Choices), err, s.log)
				}
				var texts []string
				for _, c := range a.Choices {
					texts = append(texts, c.Text)
				}
				return texts
			}
			want := answers(startStock(t, demoModel, nil, args...))
			got := answers(startShielded(t, serveOptions{model: demoModel, mode: "resident", args: args}))
			if !slices.Equal(got, want) {
				t.Errorf("%q, stock %q", got, want)
			}
		})
	}
}
