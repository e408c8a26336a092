package llamacpp

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/kvshield/kvshield/internal/forker"
)

const (
	healthEvery = 50 * time.Millisecond
	stopWithin  = 5 * time.Second
	tailBytes   = 8 << 10
)

// ServerConfig says how to start a llama-server.
type ServerConfig struct {
	Program string    // path of llama-server
	Model   string    // path of the model
	Socket  string    // Unix socket to make; its name must end in .sock
	Args    []string  // further arguments
	Env     []string  // environment
	Output  io.Writer // receives what the server prints; nil keeps only its last lines
	// HealthEvery is how often WaitHealthy asks; zero: 50 ms.
	HealthEvery time.Duration
}

// Server is a running llama-server.
type Server struct {
	cmd         *exec.Cmd
	socket      string
	healthEvery time.Duration
	tail        *tail
	done        chan struct{}
	err         error // set before done is closed
}

// StartServer starts a llama-server. It dies with this process.
func StartServer(c ServerConfig) (*Server, error) {
	args := append([]string{"-m", c.Model, "--host", c.Socket}, c.Args...)
	s := &Server{cmd: exec.Command(c.Program, args...), socket: c.Socket, healthEvery: cmp.Or(c.HealthEvery, healthEvery), tail: &tail{}, done: make(chan struct{})}
	var out io.Writer = s.tail
	if c.Output != nil {
		out = io.MultiWriter(s.tail, c.Output)
	}
	s.cmd.Env, s.cmd.Stdout, s.cmd.Stderr = c.Env, out, out
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	// A grandchild that keeps our pipe open must not keep Wait from returning.
	s.cmd.WaitDelay = time.Second
	var err error
	forker.Do(func() { err = s.cmd.Start() })
	if err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", c.Program, err)
	}
	go func() {
		s.err = s.cmd.Wait()
		os.Remove(c.Socket)
		close(s.done)
	}()
	return s, nil
}

// PID of the server.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Done is closed when the server has ended.
func (s *Server) Done() <-chan struct{} { return s.done }

// Err says how the server ended, once it has.
func (s *Server) Err() error {
	state := s.cmd.ProcessState
	var exit *exec.ExitError
	if s.err != nil && !errors.As(s.err, &exit) {
		return s.err
	}
	return &ExitError{State: state.String(), Tail: s.tail.lines(12)}
}

// ExitError is a server that ended by itself.
type ExitError struct {
	State string // such as "exit status 1"
	Tail  string // its last lines
}

func (e *ExitError) Error() string { return "llama-server ended (" + e.State + ")" }

// Dial connects to the server.
func (s *Server) Dial(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "unix", s.socket)
}

// WaitHealthy returns when the server answers that its model is loaded, or with the reason why it will not.
func (s *Server) WaitHealthy(ctx context.Context) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Dial(ctx) }}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 5 * time.Second}
	tick := time.NewTicker(s.healthEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.done:
			return s.Err()
		case <-tick.C:
		}
		if resp, err := client.Get("http://llama-server/health"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
	}
}

// Slots is how many requests the server works on at a time.
func (s *Server) Slots(ctx context.Context) (int, error) {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Dial(ctx) }, DisableKeepAlives: true}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://llama-server/props", nil)
	if err != nil {
		return 0, err
	}
	resp, err := (&http.Client{Transport: transport, Timeout: 5 * time.Second}).Do(r)
	if err != nil {
		return 0, fmt.Errorf("cannot ask llama-server for its slots: %w", err)
	}
	defer resp.Body.Close()
	var props struct {
		Slots int `json:"total_slots"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<20)).Decode(&props); err != nil || props.Slots < 1 {
		return 0, errors.New("llama-server does not say how many slots it has; use a newer one")
	}
	return props.Slots, nil
}

// Stop asks the server to end, and ends it when it does not. It returns when the server is gone.
func (s *Server) Stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
	case <-time.After(stopWithin):
		s.Kill()
	}
}

// Kill ends the server at once and returns when it is gone.
func (s *Server) Kill() {
	_ = s.cmd.Process.Kill()
	<-s.done
}

// tail keeps the last bytes written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if extra := len(t.buf) - tailBytes; extra > 0 {
		t.buf = append(t.buf[:0], t.buf[extra:]...)
	}
	return len(p), nil
}

func (t *tail) lines(n int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := strings.Split(strings.TrimRight(string(t.buf), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-n):], "\n")
}
