package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/llamacpp"
)

const patience = 60 * time.Second

// server is a running llama-server, stock or shielded, and how to ask it.
type server struct {
	url    string
	client *http.Client
	log    *buffer
	cmd    *exec.Cmd // of kvshield serve; nil for a stock server
	ended  chan error
	stop   func() // ends it before the test does; it may be called again
}

// buffer is a bytes.Buffer that several goroutines may use.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// startStock starts llama-server as it is.
func startStock(t *testing.T, model string, env []string, args ...string) *server {
	t.Helper()
	s, err := tryStock(t, model, env, args...)
	if err != nil {
		t.Fatalf("stock llama-server: %v", err)
	}
	return s
}

// tryStock starts the stock engine; what it cannot do by itself is an error.
func tryStock(t *testing.T, model string, env []string, args ...string) (*server, error) {
	t.Helper()
	log := &buffer{}
	s, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: engine("llama-server"), Model: model, Socket: filepath.Join(shortDir(t), "stock.sock"),
		Args: append([]string{"-t", "1"}, args...), Env: append(append(os.Environ(), "GGML_NO_BACKTRACE=1"), env...), Output: log})
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Dial(ctx) }}
	stop := sync.OnceFunc(func() {
		transport.CloseIdleConnections()
		s.Stop()
	})
	t.Cleanup(stop)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.WaitHealthy(ctx); err != nil {
		return nil, fmt.Errorf("%w: %s", err, lastLine(log.String()))
	}
	return &server{url: "http://stock", client: &http.Client{Transport: transport, Timeout: patience}, log: log, stop: stop}, nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// shortDir is a temporary directory with a path short enough for a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "kvs-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

type serveOptions struct {
	model string
	mode  string // empty: the command's default
	env   []string
	flags []string // of kvshield serve
	args  []string // of llama-server
}

// launch starts kvshield serve without waiting for it to be ready.
func launch(t *testing.T, o serveOptions) *server {
	t.Helper()
	address := freeAddress(t)
	args := append([]string{"serve", "-m", o.model, "--listen", address, "--engine", engine("llama-server")}, o.flags...)
	if o.mode != "" {
		args = append(args, "--mode", o.mode)
	}
	args = append(append(args, "--", "-t", "1"), o.args...)
	return begin(t, address, append(os.Environ(), o.env...), kvshield, args...)
}

// begin starts a program that is to serve on an address.
func begin(t *testing.T, address string, env []string, program string, args ...string) *server {
	t.Helper()
	s := &server{url: "http://" + address, client: &http.Client{}, log: &buffer{}, cmd: exec.Command(program, args...), ended: make(chan error, 1)}
	s.cmd.Env = env
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { s.ended <- s.cmd.Wait() }()
	s.stop = sync.OnceFunc(func() {
		s.end(t)
		s.client.CloseIdleConnections()
	})
	t.Cleanup(s.stop)
	return s
}

// startShielded starts kvshield serve and waits until it serves.
func startShielded(t *testing.T, o serveOptions) *server {
	t.Helper()
	s := launch(t, o)
	s.waitReady(t)
	return s
}

func (s *server) waitReady(t *testing.T) {
	t.Helper()
	if err := s.tryReady(); err != nil {
		t.Fatalf("%v\n%s", err, s.log)
	}
}

// tryReady waits until the server serves, or says why it does not.
func (s *server) tryReady() error { return s.tryReadyAt("/health") }

func (s *server) tryReadyAt(path string) error {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		resp, err := s.client.Get(s.url + path)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case err := <-s.ended:
			s.ended <- err
			return fmt.Errorf("kvshield serve ended: %w", err)
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("not ready: %w", err)
		}
	}
}

// end asks the command to end, and waits.
func (s *server) end(t *testing.T) {
	t.Helper()
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	_ = s.wait(t)
}

// wait returns how the command ended.
func (s *server) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-s.ended:
		s.ended <- err
		return err
	case <-time.After(patience):
		_ = s.cmd.Process.Signal(syscall.SIGQUIT) // where it is, for the log
		select {
		case <-s.ended:
		case <-time.After(5 * time.Second):
			_ = s.cmd.Process.Kill()
		}
		t.Fatalf("kvshield serve did not end\n%s", s.log)
		return nil
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// completion is an answer of /completion.
type completion struct {
	Content   string `json:"content"`
	Tokens    []int  `json:"tokens"`
	Truncated bool   `json:"truncated"` // the context was shifted
	Timings   struct {
		CacheN  int `json:"cache_n"`
		PromptN int `json:"prompt_n"`
		DraftN  int `json:"draft_n"`
	} `json:"timings"`
	Probs []struct {
		Top []struct {
			ID      int     `json:"id"`
			LogProb float64 `json:"logprob"`
		} `json:"top_logprobs"`
	} `json:"completion_probabilities"`
}

// complete asks for a greedy completion, with what else its tokens could have been. More overrides and adds request fields.
func (s *server) complete(t *testing.T, prompt string, n int, more map[string]any) completion {
	t.Helper()
	c, err := s.tryComplete(prompt, n, more)
	if err != nil {
		t.Fatalf("%v\n%s", err, s.log)
	}
	return c
}

func (s *server) tryComplete(prompt string, n int, more map[string]any) (completion, error) {
	request := map[string]any{"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": true, "return_tokens": true, "cache_prompt": false,
		"n_probs": nearest}
	for k, v := range more {
		request[k] = v
	}
	var c completion
	body, err := s.post("/completion", request)
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(body, &c)
}

func (s *server) post(path string, request any) ([]byte, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	resp, err := s.client.Post(s.url+path, "application/json", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, strings.TrimSpace(string(answer)))
	}
	return answer, err
}

// firstTokens cuts a text to its first n tokens.
func (s *server) firstTokens(t *testing.T, text string, n int) string {
	t.Helper()
	var list struct{ Tokens []int }
	body, err := s.post("/tokenize", map[string]any{"content": text})
	if err == nil {
		err = json.Unmarshal(body, &list)
	}
	if err != nil || len(list.Tokens) < n {
		t.Fatalf("%d tokens, want %d: %v", len(list.Tokens), n, err)
	}
	var cut struct{ Content string }
	if body, err = s.post("/detokenize", map[string]any{"tokens": list.Tokens[:n]}); err == nil {
		err = json.Unmarshal(body, &cut)
	}
	if err != nil {
		t.Fatal(err)
	}
	return cut.Content
}

// completeAll asks all prompts, `parallel` at a time.
func (s *server) completeAll(t *testing.T, n, parallel int, more map[string]any) []completion {
	t.Helper()
	answers := make([]completion, len(prompts))
	errs := make([]error, len(prompts))
	turn := make(chan struct{}, parallel)
	var wg sync.WaitGroup
	for i, p := range prompts {
		wg.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			answers[i], errs[i] = s.tryComplete(p, n, more)
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			t.Fatalf("%v\n%s", err, s.log)
		}
	}
	return answers
}

func httpClient(t *testing.T) *http.Client {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: patience}
}
