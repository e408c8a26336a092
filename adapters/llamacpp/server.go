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
	"time"

	"github.com/kvshield/kvshield/internal/child"
)

const healthEvery = 50 * time.Millisecond

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
	*child.Process
	socket      string
	healthEvery time.Duration
}

// ExitError is a server that ended by itself.
type ExitError = child.ExitError

// StartServer starts a llama-server. It dies with this process.
func StartServer(c ServerConfig) (*Server, error) {
	cmd := exec.Command(c.Program, append([]string{"-m", c.Model, "--host", c.Socket}, c.Args...)...)
	cmd.Env = c.Env
	p, err := child.Start(cmd, c.Output, func() { os.Remove(c.Socket) })
	if err != nil {
		return nil, err
	}
	return &Server{p, c.Socket, cmp.Or(c.HealthEvery, healthEvery)}, nil
}

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
		case <-s.Done():
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
