package e2e

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/internal/tinymodel"
)

// node-llama-cpp carries an older libllama: what both it and the engine at hand know runs in both of them, or is refused.
func TestOlderEngine(t *testing.T) {
	e, err := tinymodel.Open(t.TempDir(), filepath.Join(root, ".engine"))
	if err != nil {
		t.Fatal(err)
	}
	known := 0
	for _, name := range strings.Fields("llama qwen2 qwen3 qwen3moe gemma2 gemma3 phi2 phi3 gpt-oss gpt2 mpt falcon gptneox starcoder2 command-r olmo2 deepseek2 mamba") {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			r, err := e.Discover(dir, tinymodel.Start(name))
			if err != nil {
				t.Fatal(err)
			}
			model := filepath.Join(dir, "m.gguf")
			if err := r.Write(model); err != nil {
				t.Fatal(err)
			}
			library := filepath.Join(root, ".engine", "node", "node_modules", "node-llama-cpp", "dist", "index.js")
			script := append([]string{filepath.Join("e2e", "testdata", "older.mjs"), library, model, "64"}, archPrompts...)
			want, errs, err := run(t, nil, "node", script...)
			if err != nil {
				t.Logf("RESULT %s: stock fails: %v %s", name, err, lastLine(errs))
				want = ""
			} else {
				known++
			}
			inEachMode(t, func(t *testing.T, mode string) {
				got, errs, err := run(t, nil, kvshield, append([]string{"run", "--mode", mode, "--", "node"}, script...)...)
				why := reason(errs)
				switch {
				case err != nil && why != "":
					t.Logf("RESULT %s %s: refused: %s", name, mode, why)
				case want == "":
				case err != nil:
					t.Errorf("%v\n%s", err, errs)
				case got != want:
					t.Errorf("stock:    %q\nshielded: %q", want, got)
				default:
					t.Logf("RESULT %s %s: exact", name, mode)
				}
			})
		})
	}
	if known < 12 {
		t.Errorf("the older engine runs only %d of these models", known)
	}
}
