package bench

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/supervisor"
)

// sleeper is a process that does nothing until the test is over.
func sleeper(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Skipf("cannot start sleep: %v", err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	// Between its start and its program's there is a moment without memory.
	for readUsage(cmd.Process.Pid).files == 0 {
		time.Sleep(time.Millisecond)
	}
	return cmd.Process.Pid
}

// eventShield is a shield that only reports what happened.
type eventShield struct {
	Shield
	events supervisor.Events
	closed *int
}

func (s eventShield) Events() supervisor.Events { return s.events }
func (s eventShield) Close()                    { *s.closed++ }

func TestUnder(t *testing.T) {
	failure := errors.New("llama-bench ended")
	for name, c := range map[string]struct {
		events supervisor.Events
		err    error
		want   string // the error; empty: none
	}{
		"shielded":      {supervisor.Events{Shielded: 1}, nil, ""},
		"past the hook": {supervisor.Events{}, nil, ErrNotShielded.Error()},
		"engine failed": {supervisor.Events{Shielded: 1}, failure, "llama-bench ended"},
		"model refused": {supervisor.Events{Refusals: []string{"m.gguf: no such architecture"}}, failure, "m.gguf: no such architecture"},
		"hook gave up":  {supervisor.Events{Fatal: []string{"the enclave did not answer"}}, failure, "the enclave did not answer"},
	} {
		t.Run(name, func(t *testing.T) {
			closed := 0
			start := func() (Shield, error) { return eventShield{events: c.events, closed: &closed}, nil }
			_, err := under(t.Context(), start, func(context.Context, Shield) (int, error) { return 1, c.err })
			if got := errorText(err); got != c.want {
				t.Errorf("got error %q, want %q", got, c.want)
			}
			if closed != 1 {
				t.Errorf("the shield was closed %d times", closed)
			}
		})
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestTakeAlternatesStockFirst(t *testing.T) {
	var order []string
	c := &Config{Runs: 2, Progress: func(what string) func() { order = append(order, what); return func() {} }}
	var got []pair[int]
	n := 0
	count := func(context.Context, Shield) (int, error) { n++; return n, nil }
	for i := range 2 {
		if err := take(t.Context(), c, "decode", i, &got, count); err != nil {
			t.Fatal(err)
		}
	}
	if want := []pair[int]{{1, 2}, {3, 4}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if want := "pair 1 of 2: decode, stock|pair 1 of 2: decode, shielded|pair 2 of 2: decode, stock|pair 2 of 2: decode, shielded"; strings.Join(order, "|") != want {
		t.Errorf("got %q", order)
	}
}

func TestRunRefusesWhatIsNoModel(t *testing.T) {
	path := filepath.Join(t.TempDir(), "model.gguf")
	write(t, path, "not a model", 0o600)
	if _, err := Run(t.Context(), Config{Model: path, Runs: 1, Prompt: 1, Generate: 1}); err == nil || !strings.Contains(err.Error(), "not a GGUF file") {
		t.Errorf("got %v", err)
	}
}

// built returns a path in the repository, or skips the test.
func built(t *testing.T, path, how string) string {
	t.Helper()
	full, err := filepath.Abs(filepath.Join("../..", path))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(full); err != nil {
		t.Skipf("%s is missing; run `%s`", path, how)
	}
	return full
}

func realConfig(t *testing.T) Config {
	t.Helper()
	shield := supervisor.Config{Hook: built(t, "bin/libkvshield.so", "make build"), Enclave: built(t, "bin/kvshield-enclave", "make build"),
		Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	return Config{Model: built(t, "examples/model/demo.gguf", "git checkout"), Bench: built(t, ".engine/bin/llama-bench", "make engine"),
		Server: built(t, ".engine/bin/llama-server", "make engine"), Runs: 1, Prompt: 32, Generate: 8, Mode: "permute", DataPlane: "shm",
		NewShield: func() (Shield, error) { return supervisor.New(context.Background(), shield) }}
}

func TestRunOnARealEngine(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	t.Setenv("XDG_RUNTIME_DIR", "")
	r, err := Run(t.Context(), realConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]Comparison{"prefill": r.Prefill.PerSecond, "decode": r.Decode.PerSecond, "load": r.Load, "memory": r.Memory.Peak} {
		if c.Stock.Min <= 0 || c.Shielded.Min <= 0 || c.Ratio.Min <= 0 || len(c.Ratio.Samples) != 1 {
			t.Errorf("%s: got %+v", name, c)
		}
	}
	const layers, rowBytes = 5, 512
	if d := r.Decode.Transitions; d.Count < 8*layers || d.Bytes != rowBytes || d.Mean <= 0 || d.P50 <= 0 || d.P99 < d.P50 {
		t.Errorf("decode: %d layers and rows of %d bytes: got %+v", layers, rowBytes, d)
	}
	if p := r.Prefill.Transitions; p.Count < layers || p.Bytes <= rowBytes {
		t.Errorf("prefill: got %+v", p)
	}
	if m := r.Memory; m.Shielded.Enclave <= 0 || m.Shielded.Supervisor <= 0 || m.Stock.Enclave != 0 || m.Stock.Copy != 0 {
		t.Errorf("memory: got %+v", m)
	}
	if rest, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(rest) > 0 {
		t.Errorf("left behind: %v, %v", rest, err)
	}
}

func TestAnInterruptedRunLeavesNothing(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	t.Setenv("XDG_RUNTIME_DIR", "")
	c := realConfig(t)
	ctx, cancel := context.WithCancel(t.Context())
	c.Progress = func(what string) func() {
		if strings.HasSuffix(what, "prefill, shielded") {
			cancel()
		}
		return func() {}
	}
	if _, err := Run(ctx, c); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if rest, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(rest) > 0 {
		t.Errorf("left behind: %v, %v", rest, err)
	}
}
