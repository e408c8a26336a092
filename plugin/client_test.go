package plugin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/enclave"
)

func TestEverythingCrosses(t *testing.T) {
	c, ctx := start(t, nil), bounded(t)
	if m, err := c.Inspect(ctx, []string{"m"}); err != nil || m != someModel {
		t.Errorf("Inspect: %+v, %v", m, err)
	}
	if r, err := c.Load(ctx, enclave.LoadRequest{Sources: []string{"m"}}); err != nil || !reflect.DeepEqual(r, someLoad) {
		t.Errorf("Load: %+v, %v", r, err)
	}
	if r, err := c.Attest(ctx, []byte("nonce!")); err != nil || !reflect.DeepEqual(r, someReport) {
		t.Errorf("Attest: %+v, %v", r, err)
	}
	if err := c.Unload(ctx, someLoad.ID); err != nil {
		t.Errorf("Unload: %v", err)
	}
}

func TestKindsOfErrorsCross(t *testing.T) {
	c, ctx := start(t, nil), bounded(t)
	for source, is := range map[string]func(error) bool{
		"refused": func(err error) bool {
			var e *enclave.RefusedError
			return errors.As(err, &e) && e.Reason == "no such architecture: x"
		},
		"invalid": func(err error) bool {
			var e *enclave.InvalidError
			return errors.As(err, &e) && strings.Contains(e.Reason, "not a model")
		},
		"unknown": func(err error) bool { return errors.Is(err, enclave.ErrUnknownModel) },
		"other":   func(err error) bool { return err != nil && err.Error() == "disk on fire" },
	} {
		if _, err := c.Inspect(ctx, []string{source}); !is(err) {
			t.Errorf("Inspect of %s: %T %v", source, err, err)
		}
		if _, err := c.Load(ctx, enclave.LoadRequest{Sources: []string{source}}); !is(err) {
			t.Errorf("Load of %s: %T %v", source, err, err)
		}
	}
	if err := c.Unload(ctx, 99); !errors.Is(err, enclave.ErrUnknownModel) {
		t.Errorf("Unload of an unknown model: %v", err)
	}
}

func TestStartSaysWhy(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, test := range map[string]struct{ program, want string }{
		"missing":        {filepath.Join(dir, "absent"), "is missing; build it with `make build`"},
		"not executable": {write("plain", "x", 0o600), "is not executable (mode -rw-------)"},
		"a directory":    {dir, "is not executable (mode d"},
		"no program":     {write("junk", "\x00\x01\x02", 0o700), "exec format error"},
		"no plugin":      {write("hello", "#!/bin/sh\necho hello\n", 0o700), "did not start: Unrecognized remote plugin message"},
		"says why":       {write("why", "#!/bin/sh\necho first >&2; echo 'the reason' >&2; exit 1\n", 0o700), "did not start: the reason"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Start(Options{Program: test.program, SocketDir: dir})
			if err == nil {
				c.Close()
			}
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), test.program) {
				t.Errorf("Start: %v, want the program's path and %q", err, test.want)
			}
		})
	}
}

func TestStandardErrorIsPassedOn(t *testing.T) {
	var out bytes.Buffer
	c := start(t, func(o *Options) {
		o.Stderr = &out
		o.Program = script(t, fmt.Sprintf("echo a line >&2; exec %s \"$@\"", o.Program))
	})
	c.Close()
	if !strings.Contains(out.String(), "a line\n") {
		t.Errorf("stderr: %q", out.String())
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

func TestCrashInMidCall(t *testing.T) {
	c, ctx := start(t, nil), bounded(t)
	_, err := c.Load(ctx, enclave.LoadRequest{Sources: []string{"crash"}})
	var gone *GoneError
	if !errors.As(err, &gone) {
		t.Errorf("Load: %T %v, want a GoneError", err, err)
	}
	within(t, "Done", c.Done())
	if _, err := c.Inspect(ctx, []string{"m"}); !errors.As(err, &gone) {
		t.Errorf("a call after the crash: %T %v", err, err)
	}
	if _, _, err := c.Lend(ctx, os.Stdin); !errors.As(err, &gone) {
		t.Errorf("a loan after the crash: %T %v", err, err)
	}
	eventually(t, "the process to be reaped", func() bool { return reaped(c.PID()) })
}

func TestKilled(t *testing.T) {
	c := start(t, nil)
	call := make(chan error, 1)
	go func() { _, err := c.Inspect(context.Background(), []string{"hang"}); call <- err }()
	if err := unix.Kill(c.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	within(t, "Done", c.Done())
	var gone *GoneError
	if err := <-call; !errors.As(err, &gone) {
		t.Errorf("the call in flight: %T %v", err, err)
	}
	eventually(t, "the process to be reaped", func() bool { return reaped(c.PID()) })
}

func TestFrozenIsNoticedAndEnded(t *testing.T) {
	c := start(t, func(o *Options) { o.PingEvery, o.PingWithin = 20*time.Millisecond, time.Second })
	if err := unix.Kill(c.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	within(t, "Done", c.Done())
	eventually(t, "the process to be reaped", func() bool { return reaped(c.PID()) })
}

func TestCloseLeavesNothing(t *testing.T) {
	for name, signal := range map[string]unix.Signal{"running": 0, "frozen": unix.SIGSTOP} {
		t.Run(name, func(t *testing.T) {
			var dir string
			c := start(t, func(o *Options) { dir = o.SocketDir; o.PingEvery = time.Hour })
			if err := unix.Kill(c.PID(), signal); err != nil {
				t.Fatal(err)
			}
			closed := make(chan struct{})
			go func() { defer close(closed); c.Close(); c.Close() }()
			within(t, "Close", closed)
			within(t, "Done", c.Done())
			if !reaped(c.PID()) {
				t.Error("the process is still there, or a zombie")
			}
			left, _ := filepath.Glob(filepath.Join(dir, "*"))
			if name == "running" && len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

func TestStartWithBackoffTriesAgain(t *testing.T) {
	o := options(t)
	mark := filepath.Join(t.TempDir(), "second")
	o.Program = script(t, fmt.Sprintf("if [ ! -e %[1]s ]; then : > %[1]s; echo not yet >&2; exit 1; fi\nexec %[2]s \"$@\"", mark, o.Program))
	var failures []error
	c, err := StartWithBackoff(bounded(t), o, func(err error, _ time.Duration) { failures = append(failures, err) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if len(failures) != 1 || !strings.Contains(failures[0].Error(), "not yet") {
		t.Errorf("failures %v", failures)
	}
	if _, err := c.Inspect(bounded(t), []string{"m"}); err != nil {
		t.Error(err)
	}
}

func TestStartWithBackoffEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	_, err := StartWithBackoff(ctx, Options{Program: filepath.Join(t.TempDir(), "absent")}, func(error, time.Duration) { cancel() })
	if err == nil {
		t.Error("an absent program was started")
	}
}
