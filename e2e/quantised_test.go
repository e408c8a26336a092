package e2e

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/internal/tinymodel"
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

// Tiny models with rows of 256 weights, which all quantisations can store, in the kinds that people run.
func TestQuantisedArchitectures(t *testing.T) {
	e, err := tinymodel.Open(t.TempDir(), filepath.Join(root, ".engine"))
	if err != nil {
		t.Fatal(err)
	}
	long := prose(t)[:400]
	kinds := []string{"F16", "Q8_0", "Q4_K_M"}
	table := newModelTable(nil)
	for _, name := range strings.Fields("llama qwen3 gemma2 phi2 gptneox gpt2 qwen3moe gpt-oss") {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			r, err := e.Discover(dir, tinymodel.Start(name+":wide"))
			if err != nil {
				t.Fatal(err)
			}
			model := filepath.Join(dir, "m.gguf")
			if err := r.Write(model); err != nil {
				t.Fatal(err)
			}
			for _, kind := range kinds {
				runWays(t, table, name+" "+kind, quantise(t, model, kind), long, archWays[1:2])
			}
		})
	}
	t.Cleanup(func() {
		for _, mode := range []string{"resident", "permute"} {
			exact := 0
			for _, by := range table.ways {
				if by[mode][archWays[1].name].exact {
					exact++
				}
			}
			if exact != 8*len(kinds) {
				t.Errorf("mode %s: %d of %d exact", mode, exact, 8*len(kinds))
			}
		}
	})
}
