package llamacpp_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/llamacpp"
)

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kvs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "engine.sock")
}

// serverUnderHook is a healthy llama-server whose hook talks to a fake.
func serverUnderHook(t *testing.T) (*fake, *llamacpp.Server) {
	t.Helper()
	f := start(t, nil)
	s, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: engine("llama-server"), Model: demoModel, Socket: socketPath(t), Env: environment(f.socket())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Kill)
	if err := s.WaitHealthy(bounded(t)); err != nil {
		t.Fatal(err)
	}
	return f, s
}

func TestServerStops(t *testing.T) {
	socket := socketPath(t)
	s, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: engine("llama-server"), Model: demoModel, Socket: socket, Env: os.Environ()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Kill)
	if err := s.WaitHealthy(bounded(t)); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	select {
	case <-s.Done():
	default:
		t.Error("Stop returned before the server was gone")
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestServerThatExitsAtOnce(t *testing.T) {
	s, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: script(t, "echo one; echo the reason >&2; exit 3"), Socket: socketPath(t)})
	if err != nil {
		t.Fatal(err)
	}
	err = s.WaitHealthy(bounded(t))
	var exit *llamacpp.ExitError
	if !errors.As(err, &exit) || exit.State != "exit status 3" || exit.Tail != "one\nthe reason" || err.Error() != "script ended (exit status 3)" {
		t.Errorf("WaitHealthy: %v, %+v", err, exit)
	}
	s.Stop() // it is gone: nothing to wait for
}

func TestServerThatIsNeverHealthy(t *testing.T) {
	s, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: script(t, "exec sleep 600"), Socket: socketPath(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Kill)
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if err := s.WaitHealthy(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("WaitHealthy: %v", err)
	}
}

func TestServerThatCannotBeStarted(t *testing.T) {
	if _, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: "/absent/llama-server"}); err == nil || !strings.Contains(err.Error(), "cannot start /absent/llama-server") {
		t.Errorf("StartServer: %v", err)
	}
}

// Only so much of a server's output is kept.
func TestTailIsBounded(t *testing.T) {
	s, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: script(t, "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; exit 1"), Socket: socketPath(t)})
	if err != nil {
		t.Fatal(err)
	}
	<-s.Done()
	var exit *llamacpp.ExitError
	if !errors.As(s.Err(), &exit) || strings.Count(exit.Tail, "\n") != 11 || !strings.HasSuffix(exit.Tail, "line 2998\nline 2999") {
		t.Errorf("tail %q", exit.Tail)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	onPath := write("path/llama-on-path", 0o700)
	private := write(filepath.Join(llamacpp.PrivateEngine, "llama-private"), 0o700)
	write(filepath.Join(llamacpp.PrivateEngine, "llama-plain"), 0o600)
	both := write("path/llama-both", 0o700)
	write(filepath.Join(llamacpp.PrivateEngine, "llama-both"), 0o700)
	plain := write("plain", 0o600)
	t.Setenv("PATH", filepath.Dir(onPath))
	t.Chdir(dir)
	for program, test := range map[string]struct{ path, err string }{
		"llama-on-path":      {onPath, ""},
		"llama-private":      {private, ""},
		"llama-both":         {both, ""},
		"./path/llama-both":  {both, ""},
		onPath:               {onPath, ""},
		"llama-absent":       {"", "llama-absent is not installed; run `make engine`"},
		"llama-plain":        {"", "llama-plain is not installed; run `make engine`"},
		"./absent":           {"", "./absent is not installed"},
		plain:                {"", "is not executable (mode -rw-------)"},
		filepath.Dir(onPath): {"", "is a directory; name the program in it"},
	} {
		path, err := llamacpp.Find(program)
		if path != test.path || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("Find(%s): %q, %v; want %q, %q", program, path, err, test.path, test.err)
		}
	}
}
