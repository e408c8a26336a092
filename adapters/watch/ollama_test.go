package watch_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/kvshield/kvshield/adapters/watch"
)

// storing is a program that does with a file what Ollama's server does (copy and hash it), or what it does not.
const storing = `package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

func main() {
	switch os.Args[1] {
	case "serve", "runner":
		if f, err := os.Open(os.Args[2]); err == nil {
			io.Copy(sha256.New(), f)
		}
	case "map":
		f, _ := os.Open(os.Args[2])
		info, _ := f.Stat()
		b, err := syscall.Mmap(int(f.Fd()), 0, int(info.Size()), syscall.PROT_READ, syscall.MAP_SHARED)
		if err != nil {
			panic(err)
		}
		defer fmt.Fprint(io.Discard, b[0])
	}
	time.Sleep(time.Second)
	fmt.Println("done")
	time.Sleep(time.Minute)
}
`

func buildModule(t *testing.T, module string) string { return buildPackage(t, module, ".", "") }

// buildPackage builds the program in a folder of a module, with a text in it.
func buildPackage(t *testing.T, module, folder, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, folder), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"go.mod":                              "module " + module + "\n\ngo 1.24\n",
		filepath.Join(folder, "main.go"):      storing,
		filepath.Join(folder, "mentioned.go"): "package main\n\nimport \"os\"\n\nfunc init() {\n\tif len(os.Args) > 9 {\n\t\tprintln(\"" + text + "\")\n\t}\n}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("go", "build", "-o", "program", "./"+folder)
	cmd.Dir = dir
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return filepath.Join(dir, "program")
}

func TestOllamaMayStoreModels(t *testing.T) {
	b := newBench(t)
	ollama, other := buildModule(t, "github.com/ollama/ollama"), buildModule(t, "example.org/ollama")
	t.Run("Ollama hashes a model", func(t *testing.T) {
		for _, model := range []string{b.small, b.big} {
			w := startWatch(t, b)
			w.start(t, true, nil, ollama, "serve", model).survives(t, w)
		}
	})
	t.Run("another program hashes a model", func(t *testing.T) {
		w := startWatch(t, b)
		w.start(t, true, nil, other, "serve", b.big).killed(t, w)
	})
	t.Run("Ollama maps a model", func(t *testing.T) {
		w := startWatch(t, b)
		w.start(t, true, nil, ollama, "map", b.big).killed(t, w)
	})
	t.Run("Ollama's own engine", func(t *testing.T) {
		w := startWatch(t, b)
		v := w.start(t, true, nil, ollama, "runner", "--mlx-engine", "--model", "some").killed(t, w)
		if v.Cause != watch.MLXEngine || v.Model != "some" {
			t.Errorf("cause %v, model %q", v.Cause, v.Model)
		}
	})
}

// What carries ggml may not store models, unless it is kvshield-ollama, and no runner may.
func TestKvshieldOllamaMayStoreModels(t *testing.T) {
	b := newBench(t)
	const ggml = "gguf_init_from_file"
	own := buildPackage(t, "github.com/kvshield/kvshield/adapters/ollama/embedded", "cmd/kvshield-ollama", ggml)
	old := buildPackage(t, "github.com/ollama/ollama", ".", ggml)
	for name, test := range map[string]struct {
		program, word, model string
		survives             bool
	}{
		"kvshield-ollama stores a small model": {own, "serve", b.small, true},
		"kvshield-ollama stores a model":       {own, "serve", b.big, true},
		"kvshield-ollama runs a model":         {own, "runner", b.big, false},
		"Ollama with ggml stores a model":      {old, "serve", b.big, false},
		"Ollama with ggml runs a model":        {old, "runner", b.big, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := startWatch(t, b)
			h := w.start(t, true, nil, test.program, test.word, test.model)
			if test.survives {
				h.survives(t, w)
			} else {
				h.killed(t, w)
			}
		})
	}
}
