// Package child starts a server program, keeps its last words, and ends it: see [Start].
package child

import (
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/kvshield/kvshield/internal/forker"
)

const (
	stopWithin = 5 * time.Second
	tailBytes  = 8 << 10
	tailLines  = 12
)

// Process is a program that was started. It dies with this process.
type Process struct {
	cmd  *exec.Cmd
	name string
	tail *tail
	done chan struct{}
	err  error // set before done is closed
}

// Start starts a program in a process group of its own. What it prints goes to output, too, when that is not nil. Ended, when not
// nil, is called before Done is closed.
func Start(cmd *exec.Cmd, output io.Writer, ended func()) (*Process, error) {
	p := &Process{cmd: cmd, name: filepath.Base(cmd.Path), tail: &tail{}, done: make(chan struct{})}
	var out io.Writer = p.tail
	if output != nil {
		out = io.MultiWriter(p.tail, output)
	}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	// A grandchild that keeps our pipe open must not keep Wait from returning.
	cmd.WaitDelay = time.Second
	var err error
	forker.Do(func() { err = cmd.Start() })
	if err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", cmd.Path, err)
	}
	go func() {
		p.err = cmd.Wait()
		if ended != nil {
			ended()
		}
		close(p.done)
	}()
	return p, nil
}

// PID of the program.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the program ended, once it has.
func (p *Process) Err() error {
	var exit *exec.ExitError
	if p.err != nil && !errors.As(p.err, &exit) {
		return p.err
	}
	return &ExitError{Program: p.name, State: p.cmd.ProcessState.String(), Tail: p.tail.lines(tailLines)}
}

// ExitError is a program that ended by itself.
type ExitError struct {
	Program string // its name
	State   string // such as "exit status 1"
	Tail    string // its last lines
}

func (e *ExitError) Error() string { return e.Program + " ended (" + e.State + ")" }

// Stop asks the program to end, and ends it when it does not. It returns when the program is gone.
func (p *Process) Stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(stopWithin):
		p.Kill()
	}
}

// Kill ends the program at once and returns when it is gone.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
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
