package e2e

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// quantise makes another model of one with the engine's own tool.
func quantise(t *testing.T, model, kind string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), kind+".gguf")
	if text, err := exec.CommandContext(t.Context(), engine("llama-quantize"), model, out, kind).CombinedOutput(); err != nil {
		t.Fatalf("llama-quantize: %v\n%s", err, text)
	}
	return out
}

// roundedWeights bounds the difference of logits: with quantised weights the engine rounds activations, too, and differs from itself by up to
// 3e-2. Where it has one way of computing attention only (grok), that cannot be asked.
const roundedWeights = 2e-2

// Tiny models in the kinds that people run. A few have rows of 256 weights, which all quantisations can store; make models runs all, where
// the quantiser takes another kind for rows that do not fit.
func TestQuantisedArchitectures(t *testing.T) {
	e, err := tinyEngine()
	if err != nil {
		t.Fatal(err)
	}
	all, err := e.Architectures()
	if err != nil {
		t.Fatal(err)
	}
	long := prose(t)[:400]
	names, few := chosen(all, strings.Fields("llama:wide qwen3:wide gemma2:wide phi2:wide gptneox:wide gpt2:wide qwen3moe:wide gpt-oss:wide"))
	table := newModelTable(names)
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			model, err := tryTiny(t, name)
			for _, kind := range []string{"F16", "Q8_0", "Q4_K_M"} {
				w := archWays[1]
				w.name = kind
				if kind != "F16" {
					w.bound = roundedWeights
				}
				if err == nil {
					err = runWays(t, table, name, quantise(t, model, kind), long, []way{w})
				}
			}
			if err != nil && few {
				t.Error(err)
			} else if err != nil {
				t.Skip(err)
			}
		})
	}
	t.Cleanup(func() {
		if !few {
			table.summary(t, "quantised")
			return
		}
		for _, name := range names {
			for mode, by := range table.ways[name] {
				if o, _ := together(by); !o.exact {
					t.Errorf("%s, mode %s: %v", name, mode, o)
				}
			}
		}
	})
}
