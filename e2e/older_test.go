package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// olderFamilies are run by default; make models runs what both engines know.
var olderFamilies = strings.Fields("llama qwen3moe gemma3 gpt-oss gpt2 mpt deepseek2 mamba")

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
	e, err := tinyEngine()
	if err != nil {
		t.Fatal(err)
	}
	all, err := e.Architectures()
	if err != nil {
		t.Fatal(err)
	}
	names, few := chosen(all, olderFamilies)
	table := newModelTable(names)
	if !few {
		t.Cleanup(func() { table.summary(t, "older engine") })
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			model, err := tryTiny(t, name)
			if err != nil {
				t.Skip(err)
			}
			want, err := older(t, model)
			if err != nil && few {
				t.Fatal(err)
			} else if err != nil {
				t.Skipf("the older engine does not run it: %v", err)
			}
			inEachMode(t, func(t *testing.T, mode string) {
				o := olderOutcome(t, model, mode, want)
				t.Logf("RESULT %s %s: %v", name, mode, o)
				table.add(name, mode, archWays[0].name, o)
				if o.failed != "" || !o.exact && few && documented(t).says(name, mode) == "exact" {
					t.Error(o)
				}
			})
		})
	}
}

// olderOutcome runs a model in the older engine under a mode and compares it with what that engine says by itself.
func olderOutcome(t *testing.T, model, mode string, want answers) outcome {
	t.Helper()
	got, err := older(t, model, kvshield, "run", "--mode", mode, "--")
	var refused refusedError
	switch {
	case errors.As(err, &refused):
		return outcome{refused: string(refused)}
	case err != nil:
		return outcome{failed: err.Error()}
	}
	return compare(t, want, got, 1e-3, tie)
}
