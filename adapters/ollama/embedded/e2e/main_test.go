// Package e2e runs kvshield-ollama as its users do, and compares what it answers with the stock Ollama that was built beside it.
package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// root of the repository.
var root = func() string {
	dir, err := filepath.Abs("../../../..")
	if err != nil {
		panic(err)
	}
	return dir
}()

var (
	shielded  = filepath.Join(root, "bin", "kvshield-ollama")
	stock     = filepath.Join(root, ".engine", "ollama", "bin", "ollama")
	demoModel = filepath.Join(root, "examples", "model", "demo.gguf")
)

// home has what all servers share: the models.
var home string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	for path, how := range map[string]string{
		shielded: "make ollama", stock: "make ollama",
		filepath.Join(root, "bin", "kvshield-enclave"): "make build",
	} {
		if _, err := os.Stat(path); err != nil {
			fmt.Fprintf(os.Stderr, "e2e: %s is missing: run `%s` (or `make test-ollama`, which does)\n", path, how)
			return 1
		}
	}
	var err error
	if home, err = os.MkdirTemp("/tmp", "kvs-ollama-"); err == nil {
		defer os.RemoveAll(home)
		err = createModels()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	return m.Run()
}

// inEachMode runs a test in every mode that shields.
func inEachMode(t *testing.T, f func(t *testing.T, mode string)) {
	t.Helper()
	for _, mode := range []string{"resident", "permute"} {
		t.Run(mode, func(t *testing.T) { f(t, mode) })
	}
}
