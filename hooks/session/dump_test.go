package session

import (
	"context"
	"errors"
	"strings"
	"testing"
)

// asked starts a dump of the only peer, and returns when the hook has the request.
func asked(t *testing.T, s *Server, h hook, ctx context.Context) <-chan error {
	t.Helper()
	answer := make(chan error, 1)
	p := s.connected()[0]
	file := null(t)
	go func() { answer <- p.Dump(ctx, file) }()
	h.expect(typeDump, "", true)
	return answer
}

func TestDumpIsAnswered(t *testing.T) {
	for name, test := range map[string]struct {
		answer  dumped
		refusal string
	}{
		"done":    {dumped{Number: 1}, ""},
		"refused": {dumped{1, "not today"}, "not today"},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, &fake{})
			h := greet(t, s)
			answer := asked(t, s, h, t.Context())
			h.say(test.answer.encode())
			var refused *RefusedError
			switch err := <-answer; {
			case test.refusal == "" && err != nil:
				t.Error(err)
			case test.refusal != "" && (!errors.As(err, &refused) || refused.Reason != test.refusal):
				t.Errorf("%v, want the refusal %q", err, test.refusal)
			}
		})
	}
}

// An answer goes to the request whose number it bears; one that nobody waits for any more is dropped.
func TestLateAnswerToADump(t *testing.T) {
	s := serve(t, &fake{})
	h := greet(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	first := asked(t, s, h, ctx)
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	second := asked(t, s, h, t.Context())
	h.say(dumped{1, "too late"}.encode())
	h.say(dumped{Number: 2}.encode())
	if err := <-second; err != nil {
		t.Error(err)
	}
	h.say(dumped{Number: 2}.encode())
	h.say(raw(typeOpen, "good.gguf"), null(t))
	h.expect(typeOpened, "", true)
}

func TestPeerThatEndsBeforeItsDump(t *testing.T) {
	f := &fake{}
	s := serve(t, f)
	h := greet(t, s)
	p := s.connected()[0]
	answer := asked(t, s, h, t.Context())
	h.conn.Close()
	if err := <-answer; !errors.Is(err, ErrGone) {
		t.Errorf("%v, want %v", err, ErrGone)
	}
	<-f.gone
	if err := p.Dump(t.Context(), null(t)); !errors.Is(err, ErrGone) {
		t.Errorf("afterwards: %v, want %v", err, ErrGone)
	}
}

func TestWrongAnswersToADumpEndThePeer(t *testing.T) {
	for name, answer := range map[string][]byte{
		"none was asked for": dumped{Number: 2}.encode(),
		"number 0":           dumped{}.encode(),
		"short":              raw(typeDumped, "1234567"),
		"long":               dumped{1, strings.Repeat("x", refusalMax+1)}.encode(),
		"no reason":          raw(typeDumped, "\x01\x00\x00\x00\x01\x00\x00\x00"),
		"a reason for none":  raw(typeDumped, "\x01\x00\x00\x00\x00\x00\x00\x00why"),
		"status":             raw(typeDumped, "\x01\x00\x00\x00\x02\x00\x00\x00why"),
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, &fake{})
			h := greet(t, s)
			waiting := asked(t, s, h, t.Context())
			h.say(answer)
			h.expectEnd()
			if err := <-waiting; !errors.Is(err, ErrGone) {
				t.Errorf("%v, want %v", err, ErrGone)
			}
		})
	}
}

func TestFilesAreClosedWhenAHookSendsThemWithItsAnswer(t *testing.T) {
	s := serve(t, &fake{})
	h := greet(t, s)
	file := null(t)
	answer := asked(t, s, h, t.Context())
	before := openFiles(t)
	for range 20 {
		h.say(dumped{Number: 1}.encode(), file)
	}
	if err := <-answer; err != nil {
		t.Error(err)
	}
	eventually(t, "descriptors to be closed", func() bool { return openFiles(t) <= before })
}

func FuzzDecodeDumped(f *testing.F) {
	for _, seed := range []dumped{{Number: 1}, {2, "why"}, {3, strings.Repeat("x", refusalMax)}} {
		f.Add(seed.encode()[headerSize:])
	}
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, body []byte) {
		a, err := decodeDumped(body)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("an error of another kind: %v", err)
			}
			return
		}
		if again := a.encode()[headerSize:]; string(again) != string(body) {
			t.Fatalf("encoded again:\n% x, was\n% x", again, body)
		}
	})
}
