// Package server starts an Ollama and waits until it answers: see [Start].
//
// Ollama listens on TCP alone, so every account of the machine can reach it past whatever is put before it, as it can any Ollama.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"time"

	"github.com/kvshield/kvshield/adapters/beacon"
	"github.com/kvshield/kvshield/adapters/ollama/client"
	"github.com/kvshield/kvshield/internal/child"
)

const (
	aliveEvery = 50 * time.Millisecond
	portTries  = 3
)

// Config says how to start an Ollama.
type Config struct {
	Program string   // path of ollama
	Env     []string // environment; it is told where to listen
	Cloud   bool     // it may pass conversations on to Ollama's cloud
	Output  io.Writer
}

// Server is an Ollama that runs.
type Server struct {
	*child.Process
	address  string
	port     int
	listener beacon.Listener
}

// Start starts an Ollama on a port of the loopback address, and returns when it answers there.
func Start(ctx context.Context, c Config) (*Server, error) {
	for try := 1; ; try++ {
		s, err := start(ctx, c)
		// Somebody else may have taken the port before it did.
		if !errors.Is(err, errNotOurs) || try == portTries {
			return s, err
		}
	}
}

func start(ctx context.Context, c Config) (*Server, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	s := &Server{address: fmt.Sprintf("127.0.0.1:%d", port), port: port}
	cmd := exec.Command(c.Program, "serve")
	cmd.Env = environment(c, s.address)
	if s.Process, err = child.Start(cmd, c.Output, nil); err != nil {
		return nil, err
	}
	if err := s.waitReady(ctx); err != nil {
		s.Kill()
		return nil, err
	}
	return s, nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("no free port for Ollama: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func environment(c Config, address string) []string {
	var env []string
	for _, e := range c.Env {
		if !strings.HasPrefix(e, "OLLAMA_HOST=") && !strings.HasPrefix(e, "OLLAMA_NO_CLOUD=") {
			env = append(env, e)
		}
	}
	env = append(env, "OLLAMA_HOST="+address)
	if !c.Cloud {
		env = append(env, "OLLAMA_NO_CLOUD=1")
	}
	return env
}

// errNotOurs is another program that listens on the port.
var errNotOurs = errors.New("another program took the port that Ollama was given")

func (s *Server) waitReady(ctx context.Context) error {
	c := client.New(s.connect)
	for tick := time.NewTicker(aliveEvery); ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.Done():
			var exit *child.ExitError
			if err := s.Err(); errors.As(err, &exit) && strings.Contains(exit.Tail, "address already in use") {
				return errNotOurs
			}
			return s.Err()
		case <-tick.C:
		}
		if c.Alive(ctx) != nil {
			continue
		}
		var err error
		if s.listener, err = beacon.Listening(s.port); err == nil && !s.listener.Below(s.PID()) {
			err = errNotOurs
		}
		return err
	}
}

func (s *Server) connect(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", s.address)
}

// Dial connects to the server, and to nothing that took its port over.
func (s *Server) Dial(ctx context.Context) (net.Conn, error) {
	c, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	// Asked after connecting: whoever took the port over in between is noticed.
	if err := s.listener.Check(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}
