package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
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
)

const patience = 90 * time.Second

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

// server is a running Ollama, stock or shielded.
type server struct {
	program, address string
	cmd              *exec.Cmd
	log              *buffer
	client           *http.Client
	ended            chan error
}

// environment of every Ollama in the tests: nothing of the user's.
func environment(address string, more []string) []string {
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "OLLAMA_") && !strings.HasPrefix(e, "KVSHIELD_") {
			env = append(env, e)
		}
	}
	env = append(env, "HOME="+home, "TMPDIR="+home, "OLLAMA_MODELS="+filepath.Join(home, "models"), "OLLAMA_HOST="+address)
	return append(env, more...)
}

// launch starts `PROGRAM serve` and waits until it answers.
func launch(program string, env []string) (*server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l.Close()
	s := &server{program: program, address: l.Addr().String(), log: &buffer{}, ended: make(chan error, 1)}
	s.client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	s.cmd = exec.Command(program, "serve")
	s.cmd.Env = environment(s.address, env)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { s.ended <- s.cmd.Wait(); close(s.ended) }()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		select {
		case err := <-s.ended:
			return nil, fmt.Errorf("%s ended: %v\n%s", filepath.Base(program), err, s.log)
		default:
		}
		// It listens before it has looked for devices, and loads nothing until then.
		if strings.Contains(s.log.String(), "default_num_ctx") {
			return s, nil
		}
	}
	s.stop()
	return nil, fmt.Errorf("%s does not start\n%s", filepath.Base(program), s.log)
}

func (s *server) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.ended:
	case <-time.After(patience):
		_ = s.cmd.Process.Kill()
		<-s.ended
	}
}

func start(t *testing.T, program string, env ...string) *server {
	t.Helper()
	s, err := launch(program, env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("%s:\n%s", filepath.Base(program), s.log)
		}
	})
	return s
}

// startIn starts kvshield-ollama in a mode.
func startIn(t *testing.T, mode string, env ...string) *server {
	t.Helper()
	return start(t, shielded, append([]string{"KVSHIELD_MODE=" + mode}, env...)...)
}

// command runs a command of Ollama's against the server and returns what it prints.
func (s *server) command(args ...string) (string, error) {
	cmd := exec.Command(s.program, args...)
	cmd.Env = environment(s.address, nil)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", filepath.Base(s.program), strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// object is a JSON object.
type object = map[string]any

// post sends a request and returns the body of the answer. An answer other than 200 is an error with what it says.
func (s *server) post(path string, request object) (string, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return "", err
	}
	resp, err := s.client.Post("http://"+s.address+path, "application/json", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, text)
	}
	return string(text), err
}

// said is the text in an answer of any of the endpoints, in one piece or in many.
func said(answer string) (string, error) {
	var text strings.Builder
	for lines := bufio.NewScanner(strings.NewReader(answer)); lines.Scan(); {
		line := strings.TrimPrefix(lines.Text(), "data: ")
		if line == "" || line == "[DONE]" {
			continue
		}
		var a struct {
			Response string
			Message  struct{ Content string }
			Choices  []struct{ Message, Delta struct{ Content string } }
			Error    any
		}
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			return text.String(), fmt.Errorf("%w: %q", err, line)
		}
		if a.Error != nil {
			return text.String(), fmt.Errorf("%v", a.Error)
		}
		text.WriteString(a.Response + a.Message.Content)
		for _, c := range a.Choices {
			text.WriteString(c.Message.Content + c.Delta.Content)
		}
	}
	if text.Len() == 0 {
		return "", errors.New("the answer is empty")
	}
	return text.String(), nil
}

// ask returns the text of an answer.
func (s *server) ask(path string, request object) (string, error) {
	answer, err := s.post(path, request)
	if err != nil {
		return "", err
	}
	return said(answer)
}

// generate completes a prompt; options are Ollama's.
func (s *server) generate(t *testing.T, model, prompt string, options object) string {
	t.Helper()
	text, err := s.ask("/api/generate", object{"model": model, "prompt": prompt, "stream": false, "options": options})
	if err != nil {
		t.Fatalf("%s: %v\n%s", prompt, err, s.log)
	}
	return text
}

// unload has a model unloaded at once.
func (s *server) unload(t *testing.T, model string) {
	t.Helper()
	if _, err := s.post("/api/generate", object{"model": model, "keep_alive": 0}); err != nil {
		t.Fatal(err)
	}
}
