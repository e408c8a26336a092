package llamacpp_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/audit/live"
	"github.com/kvshield/kvshield/hooks/session"
)

// memoryFile is a file such as the supervisor passes.
func memoryFile(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("dump", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "dump")
	t.Cleanup(func() { f.Close() })
	return f
}

// asked is a context that tells when a request was sent: nobody looks at Done before.
type asked struct {
	context.Context
	sent func()
}

func (a asked) Done() <-chan struct{} { a.sent(); return a.Context.Done() }

// askWhileLoading has the hook asked for dumps, one after another, while the host loads its model: before its first graph.
func askWhileLoading(t *testing.T, f *fake, files ...*os.File) []chan error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	answers := make([]chan error, len(files))
	f.onOpen = func(p *session.Peer) {
		f.onOpen = nil
		for i, file := range files {
			sent := make(chan struct{})
			go func() { answers[i] <- p.Dump(asked{ctx, sync.OnceFunc(func() { close(sent) })}, file) }()
			<-sent
		}
	}
	for i := range answers {
		answers[i] = make(chan error, 1)
	}
	return answers
}

func expectRefusal(t *testing.T, err error, want string) {
	t.Helper()
	var refused *session.RefusedError
	if !errors.As(err, &refused) || refused.Reason != want {
		t.Errorf("%v, want the refusal %q", err, want)
	}
}

// checkDump reads a dump of the demo model.
func checkDump(t *testing.T, file *os.File) *live.Dump {
	t.Helper()
	if _, err := file.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	d, err := live.Read(file)
	if err != nil {
		t.Fatal(err)
	}
	layers := int(built.opened.Layers)
	if len(d.Cache) != 2*layers || len(d.Weights) != 3 || len(d.Buffers) == 0 {
		t.Errorf("%d cache tensors, %d weights, %d buffers; the model has %d layers", len(d.Cache), len(d.Weights), len(d.Buffers), layers)
	}
	return d
}

// A dump that nobody allowed, or that cannot be made, is refused, and the engine goes on as if nothing had been asked.
func TestRefusedDumps(t *testing.T) {
	sealed := memoryFile(t)
	if _, err := unix.FcntlInt(sealed.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_GROW); err != nil {
		t.Fatal(err)
	}
	_, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	actions := []string{"load", "decode", "decode"}
	want := stock(t, actions...)
	notAllowed := "dumps are not allowed in this run; only `kvshield audit` allows them"
	noPipe := "a dump goes to a regular file and nowhere else"
	for name, test := range map[string]struct {
		allowed   bool
		file      *os.File
		want      string
		said      string // by the hook, to people
		takenAway string // a function that the engine's ggml lacks
	}{
		"not allowed":  {false, memoryFile(t), notAllowed, "a dump of this engine was asked for: " + notAllowed, ""},
		"pipe":         {true, pipe, noPipe, "a dump of this engine was asked for: " + noPipe, ""},
		"no file":      {true, nil, noPipe, "a dump of this engine was asked for: " + noPipe, ""},
		"full":         {true, sealed, "the dump could not be written to its file", "", ""},
		"other engine": {true, memoryFile(t), "this engine's ggml has no function ggml_backend_buffer_nam?", "", "ggml_backend_buffer_name"},
	} {
		t.Run(name, func(t *testing.T) {
			takeAway(t, test.takenAway)
			var answers []chan error
			f := start(t, func(f *fake) { f.dumps, answers = test.allowed, askWhileLoading(t, f, test.file) })
			r := runHost(t, f.socket(), demoModel, actions...)
			expectRefusal(t, <-answers[0], test.want)
			if said := strings.Join(r.said(), "\n"); r.code != 0 || r.stdout != want || said != test.said {
				t.Errorf("exit code %d, printed %q, the hook said %q; want %q and %q", r.code, r.stdout, said, want, test.said)
			}
			f.expectFatal(t)
		})
	}
}

// takeAway makes the hook look for another name than the engine's function has.
func takeAway(t *testing.T, function string) {
	if function == "" {
		return
	}
	hook, err := os.ReadFile(built.hook)
	if err != nil {
		t.Fatal(err)
	}
	other := function[:len(function)-1] + "?"
	if n := bytes.Count(hook, []byte("\x00"+function+"\x00")); n != 1 {
		t.Fatalf("the hook names %s %d times", function, n)
	}
	path := filepath.Join(t.TempDir(), "libkvshield.so")
	if err := os.WriteFile(path, bytes.Replace(hook, []byte("\x00"+function+"\x00"), []byte("\x00"+other+"\x00"), 1), 0o700); err != nil {
		t.Fatal(err)
	}
	was := built.hook
	built.hook = path
	t.Cleanup(func() { built.hook = was })
}

func TestDumpLeavesTheOutputAsItWas(t *testing.T) {
	actions := []string{"load", "decode", "decode"}
	want := stock(t, actions...)
	for name, change := range map[string]func(*fake){
		"shielded": func(f *fake) { f.dumps = true },
		"observed": func(f *fake) { f.dumps, f.observe, f.opened = true, true, session.Opened{} },
	} {
		t.Run(name, func(t *testing.T) {
			file := memoryFile(t)
			var answers []chan error
			f := start(t, func(f *fake) { change(f); answers = askWhileLoading(t, f, file) })
			r := runHost(t, f.socket(), demoModel, actions...)
			if err := <-answers[0]; err != nil {
				t.Fatal(err)
			}
			if r.code != 0 || r.stdout != want || len(r.said()) != 0 {
				t.Errorf("exit code %d, printed %q, the hook said %q; want %q", r.code, r.stdout, r.said(), want)
			}
			checkDump(t, file)
			f.expectFatal(t)
			if n := f.totals.Transitions; f.observe != (n == 0) {
				t.Errorf("%d transitions", n)
			}
		})
	}
}

// Of two requests before a graph, the later one is served.
func TestTwoDumpsAtOnce(t *testing.T) {
	first, second := memoryFile(t), memoryFile(t)
	var answers []chan error
	f := start(t, func(f *fake) { f.dumps, answers = true, askWhileLoading(t, f, first, second) })
	if r := runHost(t, f.socket(), demoModel, "load", "decode"); r.code != 0 {
		t.Errorf("exit code %d\n%s", r.code, r.stderr)
	}
	expectRefusal(t, <-answers[0], "another one was asked for before the engine computed")
	if err := <-answers[1]; err != nil {
		t.Fatal(err)
	}
	checkDump(t, second)
	if info, err := first.Stat(); err != nil || info.Size() != 0 {
		t.Errorf("the refused dump has %d bytes, %v", info.Size(), err)
	}
}

// An engine that ends without a graph answers nothing: its end is the answer.
func TestDumpOfAnEngineThatEnds(t *testing.T) {
	var answers []chan error
	f := start(t, func(f *fake) { f.dumps, answers = true, askWhileLoading(t, f, memoryFile(t)) })
	runHost(t, f.socket(), demoModel, "load")
	if err := <-answers[0]; !errors.Is(err, session.ErrGone) {
		t.Errorf("%v, want %v", err, session.ErrGone)
	}
}
