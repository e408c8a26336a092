package supervisor

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/hooks/session"
	"github.com/kvshield/kvshield/plugin"
)

func TestNewSaysWhyAndLeavesNothing(t *testing.T) {
	dir := base(t)
	for name, test := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no hook":    {func(c *Config) { c.Hook = "/absent/libkvshield.so" }, "the hook library /absent/libkvshield.so is missing; build it with `make build`"},
		"no enclave": {func(c *Config) { c.Enclave = "/absent/enclave" }, "the enclave program /absent/enclave is missing"},
		"no plugin":  {func(c *Config) { c.Enclave = "/bin/true" }, "did not start"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config(t)
			test.change(&cfg)
			s, err := New(context.Background(), cfg)
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("New: %v, want %q", err, test.want)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	s := start(t, nil)
	p, _ := greet(t, s)
	silent := dial(t, s)
	pid, root := s.EnclavePID(), s.RuntimeDir().Root()
	if gone(filepath.Join(root, "session.sock")) || gone(filepath.Join(root, "libkvshield.so")) {
		t.Error("the runtime directory is not complete")
	}
	closed := make(chan struct{})
	go func() { defer close(closed); s.Close() }()
	within(t, "Close, with one peer that said hello and one that did not", closed)
	if !gone(root) {
		t.Error("the runtime directory is still there")
	}
	eventually(t, "the enclave to be reaped", func() bool { return reaped(pid) })
	for _, p := range []peer{p, silent} {
		// A peer that was let in last may be told why first.
		messages := 0
		for n, err := 1, error(nil); n != 0 && err == nil; messages++ {
			n, err = p.conn.Read(make([]byte, 1024))
		}
		if messages > 2 {
			t.Errorf("the supervisor said %d things before it hung up", messages-1)
		}
	}
}

func TestEnvironment(t *testing.T) {
	s := start(t, nil)
	hook, socket := s.RuntimeDir().Path("libkvshield.so"), "KVSHIELD_SOCKET="+s.RuntimeDir().Path("session.sock")
	for name, test := range map[string]struct{ base, want []string }{
		"empty":         {nil, []string{"LD_PRELOAD=" + hook, socket}},
		"others kept":   {[]string{"A=1", "LD_PRELOADED=x"}, []string{"A=1", "LD_PRELOADED=x", "LD_PRELOAD=" + hook, socket}},
		"own preload":   {[]string{"LD_PRELOAD=/a.so:/b.so"}, []string{"LD_PRELOAD=" + hook + ":/a.so:/b.so", socket}},
		"empty preload": {[]string{"LD_PRELOAD="}, []string{"LD_PRELOAD=" + hook, socket}},
		"nested run":    {[]string{"KVSHIELD_SOCKET=/other"}, []string{"LD_PRELOAD=" + hook, socket}},
	} {
		if got := s.Environment(test.base); !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
	if target, err := os.Readlink(hook); err != nil || target != s.cfg.Hook {
		t.Errorf("the hook's link leads to %q, %v", target, err)
	}
}

func TestEnclaveKilled(t *testing.T) {
	lost, back := make(chan struct{}, 1), make(chan struct{}, 1)
	s := start(t, func(c *Config) {
		c.EnclaveLost = func() { lost <- struct{}{} }
		c.EnclaveBack = func() { back <- struct{}{} }
	})
	p, _ := greet(t, s)
	between := []peer{dial(t, s), dial(t, s)}
	before := s.EnclavePID()
	if err := unix.Kill(before, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	between[0].hello() // to the dead enclave, or to none
	why, _ := p.expect(msgStop)
	between[1].hello()
	if !strings.HasPrefix(why, "the enclave process died; this engine ends") {
		t.Errorf("told %q", why)
	}
	p.conn.Close() // as the hook does; one that stays is killed, and that would be this process
	within(t, "EnclaveLost", lost)
	within(t, "EnclaveBack", back)
	for _, p := range between { // not told to stop: they get the next enclave
		p.expect(msgWelcome)
	}
	if now := s.EnclavePID(); now == before || now == 0 {
		t.Errorf("enclave %d, it was %d", now, before)
	}
	p, _ = greet(t, s)
	p.shielded(writeModel(t, filepath.Join(t.TempDir(), "m.gguf"), "llama", 1))
	eventually(t, "the dead enclave to be reaped", func() bool { return reaped(before) })
}

func TestEngineThatDoesNotHeedIsKilled(t *testing.T) {
	s := start(t, nil)
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	engine := exec.Command(program, "deaf-engine", s.server.Path)
	if err := engine.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its hello", func() bool { return s.Greeted(engine.Process.Pid) })
	if err := unix.Kill(s.EnclavePID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = engine.Wait() }()
	within(t, "the engine's end", ended)
	if status := engine.ProcessState.Sys().(interface{ Signal() unix.Signal }); status.Signal() != unix.SIGKILL {
		t.Errorf("it ended by %v", status.Signal())
	}
	eventually(t, "the supervisor to notice", func() bool { return !s.Greeted(engine.Process.Pid) })
}

func TestNoHelloWithoutAnEnclave(t *testing.T) {
	ended, end := context.WithCancel(context.Background())
	end() // else it would be waited for
	s := &Supervisor{ctx: ended, engines: map[*session.Peer]*engine{}}
	if _, _, err := s.Hello(context.Background(), &session.Peer{}, session.Hello{}); !errors.Is(err, errNoEnclave) {
		t.Errorf("Hello: %v", err)
	}
	if _, err := s.Attest(context.Background(), nil); !errors.Is(err, errNoEnclave) || s.EnclavePID() != 0 {
		t.Errorf("Attest: %v, pid %d", err, s.EnclavePID())
	}
}

// An engine that said hello while the enclave died was not told to stop with the others: it is not let in.
func TestHelloAcrossTheEnclavesDeath(t *testing.T) {
	for name, now := range map[string]*plugin.Client{"none yet": nil, "another": {}} {
		s := &Supervisor{engines: map[*session.Peer]*engine{}, enclave: now}
		if s.adopt(&session.Peer{}, &engine{enclave: &plugin.Client{}}) || len(s.engines) != 0 {
			t.Errorf("%s: an engine of a dead enclave was let in", name)
		}
	}
}

func TestAttest(t *testing.T) {
	s := start(t, nil)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if r, err := s.Attest(ctx, nil); err != nil || r.Backend != "fake" {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestFrozenEnclaveDoesNotHoldUpClose(t *testing.T) {
	s := start(t, nil)
	pid := s.EnclavePID()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	go func() { defer close(closed); s.Close() }()
	within(t, "Close", closed)
	eventually(t, "the enclave to be reaped", func() bool { return reaped(pid) })
}
