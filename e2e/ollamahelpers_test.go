package e2e

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

var (
	embedded    = filepath.Join(root, "bin", "kvshield-ollama")
	stockOllama = filepath.Join(root, ".engine", "ollama", "bin", "ollama")
)

// ollamas is a folder of models that the Ollamas of a test share.
type ollamas struct{ env []string }

func newOllamas(t *testing.T) *ollamas {
	t.Helper()
	for _, program := range []string{embedded, stockOllama} {
		if _, err := os.Stat(program); err != nil {
			t.Fatalf("%v: run `make ollama`", err)
		}
	}
	home := shortDir(t)
	o := &ollamas{}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "OLLAMA_") && !strings.HasPrefix(e, "KVSHIELD_") && !strings.HasPrefix(e, "HOME=") {
			o.env = append(o.env, e)
		}
	}
	o.env = append(o.env, "HOME="+home, "OLLAMA_MODELS="+filepath.Join(home, "models"), "OLLAMA_NOPRUNE=1", "OLLAMA_NUM_PARALLEL=1")
	return o
}

// serve starts kvshield serve with kvshield-ollama behind it.
func (o *ollamas) serve(t *testing.T, flags ...string) *server {
	t.Helper()
	address := freeAddress(t)
	s := begin(t, address, o.env, kvshield, append([]string{"serve", "--listen", address, "--engine", embedded}, flags...)...)
	s.waitOllama(t)
	return s
}

// start starts an Ollama by itself.
func (o *ollamas) start(t *testing.T, program string, env ...string) *server {
	t.Helper()
	address := freeAddress(t)
	s := begin(t, address, append(append(slices.Clone(o.env), "OLLAMA_HOST="+address), env...), program, "serve")
	s.waitOllama(t)
	return s
}

func (s *server) waitOllama(t *testing.T) {
	t.Helper()
	if err := s.tryReadyAt("/"); err != nil {
		t.Fatalf("%v\n%s", err, s.log)
	}
}

// upload gives Ollama a file and returns its name there.
func (s *server) upload(t *testing.T, content []byte) string {
	t.Helper()
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(content))
	resp, err := s.client.Post(s.url+"/api/blobs/"+digest, "application/octet-stream", bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		text, _ := io.ReadAll(resp.Body)
		t.Fatalf("upload: %d %s", resp.StatusCode, text)
	}
	return digest
}

// createDemo imports the demo model as demo.
func (s *server) createDemo(t *testing.T) {
	t.Helper()
	model, err := os.ReadFile(demoModel)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := s.post("/api/create", map[string]any{"model": "demo", "files": map[string]string{"demo.gguf": s.upload(t, model)}, "parameters": map[string]any{"num_thread": 1}})
	if err != nil || !bytes.Contains(answer, []byte(`"success"`)) {
		t.Fatalf("create: %s %v", answer, err)
	}
}

func ollamaPrompt(text string, n int) map[string]any {
	return map[string]any{"model": "demo", "prompt": text, "raw": true, "options": map[string]any{"temperature": 0, "num_predict": n}}
}

// line of a stream of /api/generate.
type line struct {
	Response, Error string
	Done            bool
}

func readLines(t *testing.T, r io.Reader) (lines []line) {
	t.Helper()
	for in := bufio.NewScanner(r); in.Scan(); {
		var l line
		if err := json.Unmarshal(in.Bytes(), &l); err != nil {
			t.Fatalf("%v in %s", err, in.Bytes())
		}
		lines = append(lines, l)
	}
	return lines
}

// generate streams an answer and returns its text.
func (s *server) generate(t *testing.T, prompt string, n int) string {
	t.Helper()
	answer, err := s.post("/api/generate", ollamaPrompt(prompt, n))
	if err != nil {
		t.Fatalf("%v\n%s", err, s.log)
	}
	text := ""
	lines := readLines(t, bytes.NewReader(answer))
	for _, l := range lines {
		text += l.Response
	}
	if len(lines) < n || !lines[len(lines)-1].Done {
		t.Fatalf("%d lines: %s", len(lines), answer)
	}
	return text
}

// ollamaStatus is what /kvshield/status says.
type ollamaStatus struct {
	Health struct {
		Ready  bool
		Starts int `json:"engine_starts"`
	}
	Transitions struct {
		Count    int
		Shielded int `json:"models_shielded"`
	}
	Ollama struct {
		Generation, Version string
		Installed           int                     `json:"models_installed"`
		Loaded              []struct{ Name string } `json:"models_loaded"`
		Answers             struct {
			Count     int
			Prompt    int `json:"prompt_tokens"`
			Generated int `json:"generated_tokens"`
		}
	}
	Keys string `json:"api_keys"`
}

func (s *server) ollamaStatus(t *testing.T) (st ollamaStatus) {
	t.Helper()
	resp, err := s.client.Get(s.url + "/kvshield/status")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&st); err != nil {
		t.Fatal(err)
	}
	return st
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

func alive(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !bytes.Contains(text, []byte(") Z "))
}
