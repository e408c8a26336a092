package tinymodel

import (
	"bufio"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

//go:embed probe/probe.c
var probeSource []byte

// Engine is a libllama and its backends.
type Engine struct{ root, probe string }

// Open compiles the probe into dir. root is a private engine as `make engine` makes it: lib, bin (with ggml's backends) and deps
// (with the C library that they were made for).
func Open(dir, root string) (*Engine, error) {
	source := filepath.Join(dir, "probe.c")
	if err := os.WriteFile(source, probeSource, 0o600); err != nil {
		return nil, err
	}
	e := &Engine{root, filepath.Join(dir, "probe")}
	if out, err := exec.Command("gcc", "-O1", "-o", e.probe, source, "-ldl").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("the probe does not compile: %w: %s", err, out)
	}
	return e, nil
}

func (e *Engine) command(arg string) (*exec.Cmd, error) {
	loaders, err := filepath.Glob(filepath.Join(e.root, "deps", "ld-linux*"))
	if err != nil || len(loaders) == 0 {
		return nil, fmt.Errorf("%s: no loader in its folder deps; run `make engine`", e.root)
	}
	lib := filepath.Join(e.root, "lib")
	cmd := exec.Command(loaders[0], "--library-path", lib+":"+filepath.Join(e.root, "deps"), e.probe, filepath.Join(lib, "libllama.so.0"), arg)
	cmd.Env = append(os.Environ(), "GGML_NO_BACKTRACE=1") // no debugger when it aborts
	return cmd, nil
}

// Architectures lists the names of all that the engine knows, in its own order.
func (e *Engine) Architectures() ([]string, error) {
	cmd, err := e.command("list")
	if err != nil {
		return nil, err
	}
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("the engine does not list its architectures: %w", err)
	}
	return strings.Fields(string(out)), nil
}

// session is a running probe. An engine that aborts over a file ends it.
type session struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
	err *strings.Builder
}

func (e *Engine) start() (*session, error) {
	cmd, err := e.command(filepath.Join(e.root, "bin"))
	if err != nil {
		return nil, err
	}
	s := &session{cmd: cmd, err: &strings.Builder{}}
	s.cmd.Stderr = s.err
	in, err := s.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.in, s.out = in, bufio.NewScanner(out)
	return s, s.cmd.Start()
}

func (s *session) close() {
	s.in.Close()
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

var errAborted = errors.New("the engine ended")

// load returns the engine's log of a load that failed, and whether it did not.
func (s *session) load(path string) (log string, ok bool, err error) {
	if _, err := fmt.Fprintln(s.in, path); err != nil {
		return "", false, err
	}
	var b strings.Builder
	for s.out.Scan() {
		switch s.out.Text() {
		case "LOADED":
			return b.String(), true, nil
		case "FAILED":
			return b.String(), false, nil
		}
		b.WriteString(s.out.Text() + "\n")
	}
	_ = s.cmd.Wait()
	return b.String() + s.err.String(), false, errAborted
}
