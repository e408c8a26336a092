package supervisor

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/hooks/session"
)

const (
	msgDump   = 8
	msgDumped = 9
)

// The flags that a hook obeys follow the configuration, and nothing in the environment.
func TestOnlyAnAuditAllowsDumps(t *testing.T) {
	for _, name := range []string{"KVSHIELD_AUDIT", "KVSHIELD_OBSERVE", "KVSHIELD_DUMPS", "KVSHIELD_DUMP"} {
		t.Setenv(name, "1")
	}
	for name, test := range map[string]struct {
		audit, observe bool
		flags          string
	}{
		"usual run": {false, false, "\x00\x00\x00\x00"},
		"audit":     {true, false, "\x01\x00\x00\x00"},
		"observed":  {true, true, "\x03\x00\x00\x00"},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, func(c *Config) { c.Audit, c.Observe = test.audit, test.observe })
			p := dial(t, s)
			p.hello()
			body, plane := p.expect(msgWelcome)
			if len(body) != 20 || body[16:] != test.flags {
				t.Errorf("welcome % x, want flags % x", body, test.flags)
			}
			if (plane != nil) == test.observe || (s.EnclavePID() == 0) != test.observe {
				t.Errorf("data plane %v, enclave %d", plane, s.EnclavePID())
			}
		})
	}
}

func TestNothingIsObservedOutsideAnAudit(t *testing.T) {
	base(t)
	cfg := config(t)
	cfg.Observe = true
	s, err := New(context.Background(), cfg)
	if err == nil {
		s.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "only in an audit") {
		t.Errorf("New: %v", err)
	}
}

func TestObservedModelsPass(t *testing.T) {
	s := start(t, func(c *Config) { c.Audit, c.Observe = true, true })
	p := dial(t, s)
	p.hello()
	p.expect(msgWelcome)
	p.open(writeModel(t, filepath.Join(t.TempDir(), "m.gguf"), "llama", 1))
	if body, f := p.expect(msgOpened); body[0] != 2 || f != nil {
		t.Errorf("opened % x, file %v", body, f)
	}
	if e := s.Events(); e.Passed != 1 || e.Shielded != 0 || len(e.Refusals) != 0 {
		t.Errorf("%+v", e)
	}
	if n := s.Totals().Transitions; n != 0 {
		t.Errorf("%d transitions", n)
	}
	if _, err := s.Attest(t.Context(), nil); !errors.Is(err, errObserved) {
		t.Errorf("Attest: %v", err)
	}
	p.conn.Close()
	eventually(t, "its end", func() bool { return !s.Greeted(os.Getpid()) })
}

// answerDump is a hook that writes text and answers.
func answerDump(t *testing.T, p peer, text, answer string) {
	number, f := p.expect(msgDump)
	if f == nil {
		t.Fatal("a request without a file")
	}
	if _, err := f.WriteString(text); err != nil {
		t.Error(err)
	}
	p.say(msgDumped, number+answer, nil)
}

func TestDump(t *testing.T) {
	s := start(t, func(c *Config) { c.Audit = true })
	p, _ := greet(t, s)
	type result struct {
		file *os.File
		err  error
	}
	dump := func(ctx context.Context) <-chan result {
		c := make(chan result, 1)
		go func() { f, err := s.Dump(ctx, os.Getpid()); c <- result{f, err} }()
		return c
	}

	answer := dump(t.Context())
	answerDump(t, p, "what the engine holds", "\x00\x00\x00\x00")
	r := <-answer
	if r.err != nil {
		t.Fatal(r.err)
	}
	defer r.file.Close()
	if got, err := io.ReadAll(r.file); err != nil || string(got) != "what the engine holds" {
		t.Errorf("%q, %v", got, err)
	}

	answer = dump(t.Context())
	answerDump(t, p, "half of i", "\x01\x00\x00\x00out of memory")
	var refused *session.RefusedError
	if r := <-answer; !errors.As(r.err, &refused) || refused.Reason != "out of memory" || r.file != nil {
		t.Errorf("%v, %v", r.file, r.err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	answer = dump(ctx)
	p.expect(msgDump)
	cancel()
	if r := <-answer; !errors.Is(r.err, context.Canceled) {
		t.Errorf("an engine that computes nothing: %v", r.err)
	}

	answer = dump(t.Context())
	p.expect(msgDump)
	p.conn.Close()
	if r := <-answer; !errors.Is(r.err, session.ErrGone) {
		t.Errorf("an engine that ended: %v", r.err)
	}
	if _, err := s.Dump(t.Context(), 1); err == nil || !strings.Contains(err.Error(), "process 1 has no hook") {
		t.Errorf("a process without a hook: %v", err)
	}
}
