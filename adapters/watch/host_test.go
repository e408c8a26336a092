package watch_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/adapters/watch"
	"github.com/kvshield/kvshield/internal/gguf"
)

const (
	bigTensor   = 64 << 20
	smallTensor = 2 << 20
	// patience bounds waiting for what must happen; quiet is how long what must not is waited for:
	// longer than the slowest regular look at a process.
	patience = 20 * time.Second
	quiet    = 400 * time.Millisecond
)

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		os.Exit(watchAsOrdinaryUser())
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// bench holds the programs and models of one test.
type bench struct {
	dir                           string
	static, dynamic, engine, hook string
	embedded                      string
	big, small                    string
}

func newBench(t *testing.T) bench {
	t.Helper()
	dir := t.TempDir()
	build := func(name string, args ...string) string {
		out := filepath.Join(dir, name)
		text, err := exec.Command("gcc", append(args, "-O1", "-o", out)...).CombinedOutput()
		if err != nil {
			t.Fatalf("building %s: %v\n%s", name, err, text)
		}
		return out
	}
	empty := filepath.Join(dir, "empty.c")
	if err := os.WriteFile(empty, []byte("int kvshield_absent;\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const source = "testdata/host.c"
	return bench{
		dir:      dir,
		static:   build("static", "-static", source),
		engine:   build("engine", "-static", "-DEMBED", source),
		dynamic:  build("dynamic", source),
		embedded: build("embedded", "-DEMBED", source),
		hook:     build("libkvshield.so", "-shared", "-fPIC", empty),
		big:      writeModel(t, dir, "big.bin", bigTensor),
		small:    writeModel(t, dir, "small.bin", smallTensor),
	}
}

func writeModel(t *testing.T, dir, name string, bytes int64) string {
	t.Helper()
	var b gguf.Builder
	b.Key("general.architecture", "llama")
	b.Tensor("blk.0.attn_q.weight", gguf.F32, []int64{1024, bytes / 4096}, nil)
	path := filepath.Join(dir, name)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := b.WriteTo(f); err != nil {
		t.Fatal(err)
	}
	return path
}

// watching is a watcher at work over this test's children.
type watching struct {
	bench
	violations chan watch.Violation
	mu         sync.Mutex
	greeted    map[int]bool
}

func startWatch(t *testing.T, b bench) *watching {
	t.Helper()
	w := &watching{bench: b, violations: make(chan watch.Violation, 16), greeted: map[int]bool{}}
	watcher := watch.New(watch.Config{
		Root: os.Getpid(),
		Hook: b.hook,
		Greeted: func(pid int) bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.greeted[pid]
		},
		Violated: func(v watch.Violation) { w.violations <- v },
	})
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); watcher.Run(ctx) }()
	t.Cleanup(func() { stop(); <-ended })
	return w
}

func (w *watching) greet(pid int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.greeted[pid] = true
}

// host is a started program.
type host struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it said "done"
	end  chan error
}

// start runs a program; before, where not nil, is called before it may go past its own start.
func (w *watching) start(t *testing.T, hooked bool, before func(pid int), program string, args ...string) *host {
	t.Helper()
	// The shell waits for a line, so that before can be called in time, then becomes the program.
	cmd := exec.Command("sh", append([]string{"-c", `read go; exec "$0" "$@"`, program}, args...)...)
	// A group of its own, to be ended with all that it forked.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	if hooked {
		cmd.Env = append(cmd.Env, "LD_PRELOAD="+w.hook)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h := &host{cmd: cmd, done: make(chan struct{}), end: make(chan error, 1)}
	if before != nil {
		before(cmd.Process.Pid)
	}
	fmt.Fprintln(in, "go")
	go func() {
		defer func() { h.end <- cmd.Wait() }()
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if lines.Text() == "done" {
				close(h.done)
			}
		}
	}()
	t.Cleanup(func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); <-h.end; h.end <- nil })
	return h
}

func (w *watching) violation(t *testing.T) watch.Violation {
	t.Helper()
	select {
	case v := <-w.violations:
		return v
	case <-time.After(patience):
		t.Fatal("the process was not ended")
		panic("unreachable")
	}
}

// killed waits for the violation and for the end of the process.
func (h *host) killed(t *testing.T, w *watching) watch.Violation {
	t.Helper()
	v := w.violation(t)
	if v.PID != h.cmd.Process.Pid || v.Kill != nil {
		t.Fatalf("violation of process %d (kill: %v), want %d killed", v.PID, v.Kill, h.cmd.Process.Pid)
	}
	err := <-h.end
	h.end <- nil
	if err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("the process ended with %v, want killed", err)
	}
	return v
}

// survives waits until the process has done what it does, and that nothing happens to it.
func (h *host) survives(t *testing.T, w *watching) {
	t.Helper()
	select {
	case <-h.done:
	case v := <-w.violations:
		t.Fatalf("ended: %v", v)
	case <-time.After(patience):
		t.Fatal("the program did not get done")
	}
	select {
	case v := <-w.violations:
		t.Fatalf("ended: %v", v)
	case <-time.After(quiet):
	}
}
