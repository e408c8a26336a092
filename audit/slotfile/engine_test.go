package slotfile

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/llamacpp"
)

const (
	model   = "../../examples/model/demo.gguf"
	program = "../../.engine/bin/llama-server"
	text    = "The sea was calm and the sky was clear."
)

var demo = Shape{Layers: 5, HeadsKV: 2}

// engine is a running llama-server that can save its slots.
type engine struct {
	dir    string
	client http.Client
}

func start(t testing.TB, args ...string) *engine {
	t.Helper()
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v; run make engine", err)
	}
	// A socket's path must be short.
	dir, err := os.MkdirTemp("/tmp", "kvs-slot-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: program, Model: model, Socket: filepath.Join(dir, "s.sock"), Env: os.Environ(),
		Args: append([]string{"-c", "512", "-t", "1", "--slot-save-path", dir + "/"}, args...)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.WaitHealthy(ctx); err != nil {
		t.Fatal(err)
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Dial(ctx) }
	return &engine{dir, http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dial}}}
}

func (e *engine) post(t testing.TB, path string, request map[string]any, answer any) {
	t.Helper()
	body, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := e.client.Post("http://engine"+path, "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(answer); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatal(path, resp.Status, err)
	}
}

func (e *engine) tokenize(t testing.TB, content string) []int32 {
	t.Helper()
	var said struct{ Tokens []int32 }
	e.post(t, "/tokenize", map[string]any{"content": content, "add_special": true}, &said)
	return said.Tokens
}

// ask has n tokens generated after a prompt, in a slot.
func (e *engine) ask(t testing.TB, slot int, prompt []int32, n int) {
	t.Helper()
	e.post(t, "/completion", map[string]any{"prompt": prompt, "n_predict": n, "id_slot": slot, "cache_prompt": true, "temperature": 0, "ignore_eos": true}, &struct{}{})
}

// save returns the path of a new slot file.
func (e *engine) save(t testing.TB, slot int) string {
	t.Helper()
	e.post(t, fmt.Sprintf("/slots/%d?action=save", slot), map[string]any{"filename": "slot.bin"}, &struct{}{})
	return filepath.Join(e.dir, "slot.bin")
}

// saved is the slot file of an engine of one slot after a short prompt.
func saved(t testing.TB, args ...string) (file []byte, tokens []int32) {
	t.Helper()
	e := start(t, append([]string{"-np", "1"}, args...)...)
	tokens = e.tokenize(t, text)
	e.ask(t, 0, tokens, 0)
	file, err := os.ReadFile(e.save(t, 0))
	if err != nil {
		t.Fatal(err)
	}
	return file, tokens
}
