package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/adapters/beacon"
	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/adapters/ollama/store"
	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/adapters/watch"
	"github.com/kvshield/kvshield/internal/forker"
)

func newRun() *cobra.Command {
	var o options
	var allowed []string
	cmd := &cobra.Command{
		Use:   "run [flags] -- PROGRAM [ARGUMENTS]",
		Short: "run any program on libllama, its children included, with every model shielded",
		Long: `Runs a program unchanged. Every model that it or a child of it loads through libllama is shielded; a
program that kvshield's hook cannot reach is ended before it can answer. llama.cpp's own programs are
found in .engine/bin when they are not on the PATH.

The exit code is the program's own, or 1 when something had to be ended. When the program has ended,
kvshield waits for engines it left running and ends whatever else remains of its processes.`,
		Example: `  kvshield run -- llama-completion -m model.gguf -p "The sea" -n 64
  kvshield run -- sh -c 'llama-server -m a.gguf --port 8081 & llama-server -m b.gguf --port 8082 & wait'`,
		Args: exactly(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.checkMode(); err != nil {
				return err
			}
			program, err := findProgram(args[0])
			if err != nil {
				return err
			}
			child := exec.Command(program, args[1:]...)
			child.Args[0] = args[0]
			child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
			if o.Mode == modeOff {
				return runPlain(child)
			}
			return runShielded(&o, child, allowed)
		},
	}
	o.register(cmd)
	cmd.Flags().StringSliceVar(&allowed, "allow-unshielded", nil, "models that run in the clear, by their path or Ollama's name for them; for those that the mode cannot shield")
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func findProgram(name string) (string, error) {
	path, err := llamacpp.Find(name)
	var missing *llamacpp.NotFoundError
	if errors.As(err, &missing) && !isEngineProgram(name) {
		return "", fmt.Errorf("%s: no such program", name)
	}
	return path, err
}

func isEngineProgram(name string) bool { return len(name) > 6 && name[:6] == "llama-" }

func runPlain(child *exec.Cmd) error {
	say("mode off: the KV cache is in clear")
	return exitOf(child.Run())
}

// exitOf turns the end of a program into our own.
func exitOf(err error) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return exitCode(128 + int(status.Signal()))
	}
	return exitCode(exit.ExitCode())
}

func runShielded(o *options, child *exec.Cmd, allowed []string) error {
	cfg, err := o.Config()
	if err != nil {
		return err
	}
	if len(allowed) > 0 {
		cfg.Allowed = store.Listed(allowed)
	}
	cfg.Program = child.Args[0]
	// Not the command's context: a signal is for the program, and the shield stays up until that has ended.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s, err := supervisor.New(ctx, cfg)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot become the reaper of the program's children: %w", err)
	}
	endWatch := watchTree(ctx, s)
	if err := beacon.Light(ctx, o.Mode, s); err != nil {
		return err
	}
	child.Env = s.Environment(os.Environ())
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	forker.Do(func() { err = child.Start() })
	if err != nil {
		return fmt.Errorf("cannot start %s: %w", child.Args[0], err)
	}
	signals := forwardSignals(child.Process)
	err = child.Wait()
	tree := descendants{exempt: s.EnclavePID}
	tree.waitWhile(func(pid int) bool { return s.Greeted(pid) && !signals.ending() })
	tree.end()
	signals.stop()
	return lastWords(s, child.Args[0], endWatch(), err)
}

// watchTree starts the watch over this process's descendants. The returned function ends it and returns what it found.
func watchTree(ctx context.Context, s *supervisor.Supervisor) (end func() []watch.Violation) {
	var found []watch.Violation
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	w := watch.New(watch.Config{
		Root:    os.Getpid(),
		Exempt:  func(pid int) bool { return pid == s.EnclavePID() },
		Greeted: s.Greeted,
		Hook:    s.Hook(),
		Violated: func(v watch.Violation) {
			say("%v", v)
			found = append(found, v)
		},
	})
	go func() { defer close(done); w.Run(ctx) }()
	return func() []watch.Violation {
		cancel()
		<-done
		return found
	}
}

// forwarding passes signals on to the program.
type forwarding struct {
	signals chan os.Signal
	end     atomic.Bool // somebody wants the run to end
}

// forwardSignals passes on what is sent to this process alone. An interrupt from the terminal reaches the program
// by itself.
func forwardSignals(p *os.Process) *forwarding {
	f := &forwarding{signals: make(chan os.Signal, 8)}
	signal.Notify(f.signals, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	_, err := unix.IoctlGetTermios(int(os.Stdin.Fd()), unix.TCGETS)
	terminal := err == nil
	go func() {
		for sig := range f.signals {
			if sig != syscall.SIGUSR1 && sig != syscall.SIGUSR2 {
				f.end.Store(true)
			}
			if terminal && (sig == syscall.SIGINT || sig == syscall.SIGQUIT) {
				continue
			}
			_ = p.Signal(sig)
		}
	}()
	return f
}

func (f *forwarding) ending() bool { return f.end.Load() }

func (f *forwarding) stop() { signal.Stop(f.signals); close(f.signals) }

func lastWords(s *supervisor.Supervisor, program string, violations []watch.Violation, err error) error {
	e := s.Events()
	if e.Shielded == 0 && e.Clear == 0 && len(e.Refusals) == 0 && len(violations) == 0 {
		say("nothing was shielded: %s loaded no model that the hook could see", program)
	}
	if len(violations) > 0 {
		return exitCode(exitError)
	}
	return exitOf(err)
}

// descendants are the processes below this one, but for one of them and those below that.
type descendants struct{ exempt func() int }

const (
	lookEvery  = 50 * time.Millisecond
	endPatient = 2 * time.Second
)

func (d descendants) list() []int {
	var pids, spared []int
	if pid := d.exempt(); pid != 0 {
		spared = append(watch.Descendants(pid), pid)
	}
	for _, pid := range watch.Descendants(os.Getpid()) {
		if !slices.Contains(spared, pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// waitWhile waits for processes of which keep is true, reaping those that were left to us.
func (d descendants) waitWhile(keep func(pid int) bool) {
	for {
		waiting := false
		for _, pid := range d.list() {
			if !d.reap(pid) && keep(pid) {
				waiting = true
			}
		}
		if !waiting {
			return
		}
		time.Sleep(lookEvery)
	}
}

// end asks what is left to end, and ends what does not.
func (d descendants) end() {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		for _, pid := range d.list() {
			_ = unix.Kill(pid, sig)
		}
		for end := time.Now().Add(endPatient); time.Now().Before(end) && len(d.list()) > 0; time.Sleep(lookEvery) {
			for _, pid := range d.list() {
				d.reap(pid)
			}
		}
	}
}

func (d descendants) reap(pid int) bool {
	got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil)
	return err == nil && got == pid
}
