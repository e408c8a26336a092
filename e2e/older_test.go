package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/internal/tinymodel"
)

// olderFamilies are run by default; KVSHIELD_ARCHITECTURES=all (make models) runs what either engine knows.
var olderFamilies = strings.Fields("llama qwen2 qwen3moe gemma2 gemma3 phi3 gpt-oss gpt2 mpt falcon deepseek2 mamba")

// older asks node-llama-cpp, which carries an older libllama, by way of a command that is put before it.
func older(t *testing.T, model string, command ...string) (a answers, err error) {
	t.Helper()
	library := filepath.Join(root, ".engine", "node", "node_modules", "node-llama-cpp", "dist", "index.js")
	command = append(command, "node", filepath.Join("e2e", "testdata", "older.mjs"), library, model, fmt.Sprint(archTokens), fmt.Sprint(nearest))
	out, errs, err := run(t, nil, command[0], append(command[1:], append(archPrompts, prose(t)[:400])...)...)
	if why := reason(errs); err != nil && why != "" {
		return a, refusedError(why)
	} else if err != nil {
		return a, fmt.Errorf("%w: %s", err, lastLine(errs))
	}
	for line := range strings.Lines(out) {
		var c struct {
			completion
			First completion
		}
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			return a, err
		}
		a.texts, a.firsts = append(a.texts, c.completion), append(a.firsts, c.First)
	}
	return a, nil
}

type refusedError string

func (e refusedError) Error() string { return string(e) }

// What both the older libllama and the engine at hand know runs in both of them, or is refused.
func TestOlderEngine(t *testing.T) {
	e, err := tinymodel.Open(t.TempDir(), filepath.Join(root, ".engine"))
	if err != nil {
		t.Fatal(err)
	}
	names := olderFamilies
	switch only := os.Getenv("KVSHIELD_ARCHITECTURES"); only {
	case "":
	case "all":
		if names, err = e.Architectures(); err != nil {
			t.Fatal(err)
		}
	default:
		names = strings.Fields(only)
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			model := filepath.Join(t.TempDir(), "m.gguf")
			r, err := e.Discover(t.TempDir(), tinymodel.Start(name))
			if err != nil {
				t.Skip(err)
			}
			if err := r.Write(model); err != nil {
				t.Fatal(err)
			}
			want, err := older(t, model)
			if err != nil {
				t.Skipf("the older engine does not run it: %v", err)
			}
			inEachMode(t, func(t *testing.T, mode string) {
				got, err := older(t, model, kvshield, "run", "--mode", mode, "--")
				var refused refusedError
				switch {
				case errors.As(err, &refused):
					t.Logf("RESULT %s %s: refused: %s", name, mode, refused)
				case err != nil:
					t.Error(err)
				default:
					if o := compare(t, want, got, 1e-3, tie); o.failed != "" {
						t.Error(o)
					} else {
						t.Logf("RESULT %s %s: %v", name, mode, o)
					}
				}
			})
		})
	}
}
