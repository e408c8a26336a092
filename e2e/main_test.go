// Package e2e runs the command against the real engines: what a user would see, compared with what the stock engine
// says.
package e2e

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// root of the repository.
var root = func() string {
	dir, err := filepath.Abs("..")
	if err != nil {
		panic(err)
	}
	return dir
}()

var (
	kvshield  = filepath.Join(root, "bin", "kvshield")
	demoModel = filepath.Join(root, "examples", "model", "demo.gguf")
)

// buildDir is for what tests make once for all.
var buildDir string

func engine(name string) string { return filepath.Join(root, ".engine", "bin", name) }

func TestMain(m *testing.M) {
	for path, how := range map[string]string{
		kvshield: "make build",
		filepath.Join(root, "bin", "kvshield-enclave"): "make build",
		filepath.Join(root, "bin", "libkvshield.so"):   "make build",
		engine("llama-server"):                         "make engine",
		filepath.Join(root, ".engine", "node"):         "make node-host",
	} {
		if _, err := os.Stat(path); err != nil {
			fmt.Fprintf(os.Stderr, "e2e: %s is missing: run `%s` (or `make test`, which does)\n", path, how)
			os.Exit(1)
		}
	}
	dir, err := os.MkdirTemp("/tmp", "kvs-e2e-build-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	buildDir = dir
	code := m.Run()
	os.RemoveAll(buildDir)
	os.Exit(code)
}

// inEachMode runs a test in every mode that shields.
func inEachMode(t *testing.T, f func(t *testing.T, mode string)) {
	t.Helper()
	for _, mode := range []string{"resident", "permute"} {
		t.Run(mode, func(t *testing.T) { f(t, mode) })
	}
}

// vulkan is the environment in which ggml sees the software Vulkan device.
func vulkan(t *testing.T) []string {
	t.Helper()
	f, err := os.Open(filepath.Join(root, ".engine", "vulkan.env"))
	if err != nil {
		t.Fatalf("no Vulkan device: %v; run `make engine`", err)
	}
	defer f.Close()
	var env []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if strings.Contains(lines.Text(), "=") {
			env = append(env, lines.Text())
		}
	}
	return env
}

// prompts are those, of some fifty tried, after which the demo model's two best tokens stay furthest apart: at least 0.014 in
// log-probability over 200 tokens. Closer ties fall either way, for the stock engine too: with flash attention
// and without it, its own log-probabilities differ by up to 0.018.
var prompts = []string{
	"At last",
	"The sailors",
	"The Constitution of the United States",
	"Upon the whole",
	"Fellow citizens of the Senate",
	"Our foreign relations",
	"The President of the United States",
	"The Indian tribes",
}
