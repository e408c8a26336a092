package llamacpp_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/session"
)

func TestWithoutASocket(t *testing.T) {
	runHost(t, "", demoModel, "load", "decode").expectDeath(t, "",
		"libkvshield.so is loaded but KVSHIELD_SOCKET is not set; start this program with `kvshield run -- PROGRAM`")
}

func TestSocketThatIsNotThere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "absent.sock")
	runHost(t, path, demoModel, "load").expectDeath(t, "",
		"cannot reach the kvshield supervisor at "+path+": No such file or directory; is `kvshield run` or `kvshield serve` still there?")
}

func TestSocketPathThatIsTooLong(t *testing.T) {
	runHost(t, "/"+strings.Repeat("x", 200), demoModel, "load").expectDeath(t, "",
		"KVSHIELD_SOCKET is longer than a socket's path can be (107 bytes)")
}

func TestRefusedHello(t *testing.T) {
	f := start(t, func(f *fake) { f.noHello = "no engines today" })
	runHost(t, f.socket(), demoModel, "load").expectDeath(t, "", "refused: no engines today")
}

const lost = "the kvshield supervisor is gone; this engine ends because its enclave can no longer be reached"

func TestSupervisorThatHangsUpOnAnIdleHost(t *testing.T) {
	f := start(t, nil)
	go func() { <-f.greeted; time.Sleep(100 * time.Millisecond); f.server.Close() }()
	runHost(t, f.socket(), demoModel, "load", "idle").expectDeath(t, "load ok\n", lost)
}

func TestSupervisorThatHangsUpOnAnIdleServer(t *testing.T) {
	f, s := serverUnderHook(t)
	f.server.Close()
	select {
	case <-s.Done():
	case <-time.After(patience):
		t.Fatal("llama-server outlived its supervisor")
	}
	var exit *llamacpp.ExitError
	if err := s.Err(); !errors.As(err, &exit) || exit.State != "exit status 1" || !strings.Contains(exit.Tail, "kvshield: error: "+lost) {
		t.Errorf("it ended with %v: %+v", s.Err(), exit)
	}
}

func TestWordToStop(t *testing.T) {
	f, s := serverUnderHook(t)
	f.mu.Lock()
	session.Stop("the enclave process died", slices.Collect(maps.Keys(f.ends))...)
	f.mu.Unlock()
	select {
	case <-s.Done():
	case <-time.After(patience):
		t.Fatal("llama-server did not heed the word to stop")
	}
	f.expectFatal(t, "the enclave process died")
}

func TestIdentityLeavesTheOutputAsItWas(t *testing.T) {
	actions := []string{"load", "decode", "decode", "unload", "load", "decode", "unload"}
	want := stock(t, actions...)
	row := 4 * built.opened.RowFloats
	for name, change := range map[string]func(*fake){
		"shared memory":    nil,
		"socket":           func(f *fake) { f.transport = session.Socket },
		"frames of a page": func(f *fake) { f.capacity = 4096 },
		"one row a frame":  func(f *fake) { f.transport, f.capacity = session.Socket, row },
	} {
		t.Run(name, func(t *testing.T) {
			f := start(t, change)
			r := runHost(t, f.socket(), demoModel, actions...)
			if r.code != 0 || r.stdout != want || len(r.said()) != 0 {
				t.Errorf("exit code %d, printed %q, the hook said %q; want %q", r.code, r.stdout, r.said(), want)
			}
			if opens := f.asked(); len(opens) != 2 || opens[0] != demoModel {
				t.Errorf("opens %q, want one for each load", opens)
			}
			f.expectFatal(t)
		})
	}
}

// doubles shows whether the engine really goes on with what the enclave returned.
type doubles struct{}

func (doubles) Invert(_ enclave.ModelID, _ int, dst, src []float32) error {
	for i, v := range src {
		dst[i] = 2 * v
	}
	return nil
}

func TestEnclavesAnswerIsWhatTheEngineGoesOnWith(t *testing.T) {
	want := stock(t, "load", "decode")
	f := start(t, func(f *fake) { f.inverter = doubles{} })
	if r := runHost(t, f.socket(), demoModel, "load", "decode"); r.code != 0 || r.stdout == want {
		t.Errorf("exit code %d, printed %q although the enclave changed every value", r.code, r.stdout)
	}
}

// The host's own callback is asked about every node, and sees the attention output as the enclave returned it.
func TestHostsOwnCallback(t *testing.T) {
	actions := []string{"observe", "load", "decode", "observed"}
	want := stock(t, actions...)
	f := start(t, nil)
	if r := runHost(t, f.socket(), demoModel, actions...); r.code != 0 || r.stdout != want {
		t.Errorf("exit code %d, printed %q, want %q\n%s", r.code, r.stdout, want, r.stderr)
	}
	var sum, doubled float64
	if _, err := fmt.Sscanf(lastLine(want), "asked about more, seen 1, sum %g", &sum); err != nil {
		t.Fatalf("%q: %v", want, err)
	}
	f = start(t, func(f *fake) { f.inverter = doubles{} })
	r := runHost(t, f.socket(), demoModel, actions...)
	if _, err := fmt.Sscanf(lastLine(r.stdout), "asked about more, seen 1, sum %g", &doubled); err != nil {
		t.Fatalf("%q: %v", r.stdout, err)
	}
	if ratio := doubled / sum; ratio < 1.9999 || ratio > 2.0001 {
		t.Errorf("the host saw a sum of %g where the enclave had doubled %g", doubled, sum)
	}
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

func TestHostsCallbackMayStopTheGraph(t *testing.T) {
	actions := []string{"stop", "load", "decode", "observed"}
	f := start(t, nil)
	r := runHost(t, f.socket(), demoModel, actions...)
	if r.code != 0 || len(r.said()) != 0 || !strings.Contains(lastLine(r.stdout), "seen 1,") {
		t.Errorf("exit code %d, printed %q, the hook said %q", r.code, r.stdout, r.said())
	}
}

func TestRefusedModelIsTheEnginesOwnFailure(t *testing.T) {
	f := start(t, func(f *fake) { f.refuse = "no such architecture" })
	r := runHost(t, f.socket(), demoModel, "load", "load")
	if said := r.said(); r.code != 0 || r.stdout != "load failed\nload failed\n" || len(said) != 2 || said[0] != demoModel+": no such architecture" {
		t.Errorf("exit code %d, printed %q, the hook said %q", r.code, r.stdout, said)
	}
	f.expectFatal(t)
}

func TestRefusedModelEndsAServer(t *testing.T) {
	f := start(t, func(f *fake) { f.refuse = "no such architecture" })
	r := run(t, f.socket(), engine("llama-server"), "-m", demoModel, "--host", socketPath(t))
	if r.code == 0 || !strings.Contains(r.stderr, "kvshield: error: "+demoModel+": no such architecture\n") {
		t.Errorf("exit code %d\n%s", r.code, r.stderr)
	}
	f.expectFatal(t)
}

func TestFileThatIsNoModelIsLeftToTheEngine(t *testing.T) {
	text := filepath.Join(t.TempDir(), "text.gguf")
	if err := os.WriteFile(text, []byte("no model"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{text, filepath.Join(t.TempDir(), "absent"), t.TempDir()} {
		f := start(t, nil)
		r := runHost(t, f.socket(), path, "load")
		if r.code != 0 || r.stdout != "load failed\n" || len(r.said()) != 0 || len(f.asked()) != 0 {
			t.Errorf("%s: exit code %d, printed %q, the hook said %q, asked for %q", path, r.code, r.stdout, r.said(), f.asked())
		}
	}
}

func TestModelThroughAStreamIsRefused(t *testing.T) {
	f := start(t, nil)
	r := runHost(t, f.socket(), demoModel, "load-stream")
	if said := r.said(); r.code != 0 || r.stdout != "load failed\n" || len(said) == 0 ||
		said[0] != "this program opens its model through a FILE*, which kvshield cannot exchange; have it open the model by its path" {
		t.Errorf("exit code %d, printed %q, the hook said %q", r.code, r.stdout, said)
	}
}

func TestForkAfterLoading(t *testing.T) {
	f := start(t, nil)
	r := runHost(t, f.socket(), demoModel, "load", "decode", "child", "child-decodes", "decode")
	lines := strings.Split(r.stdout, "\n")
	want := []string{"load ok", "", "child ended with 0", "child ended with 1", "", ""}
	for i, line := range lines {
		if i < len(want) && want[i] != "" && line != want[i] {
			t.Errorf("line %d is %q, want %q", i, line, want[i])
		}
	}
	said := r.said()
	if r.code != 0 || len(lines) != len(want) || len(said) != 1 || said[0] != "this process was forked from one that had already loaded a model; "+
		"kvshield cannot share a data plane between processes: load the model in the child" {
		t.Errorf("exit code %d, printed %q, the hook said %q", r.code, r.stdout, said)
	}
	f.expectFatal(t) // the child has no say on its parent's connection
}

func TestModelThatWasNotExchangedDoesNotRun(t *testing.T) {
	rotary := "this engine was told to use another rotary embedding than its model's own (base %g over %d rows, the model has base %g over %d rows); " +
		"leave out options such as --rope-freq-base and --rope-scaling yarn"
	base, dims := built.opened.RotaryBase, built.opened.RotaryDim
	for name, test := range map[string]struct {
		change func(*session.Opened)
		want   string
	}{
		"passed":      {func(o *session.Opened) { *o = session.Opened{} }, "a graph with attention belongs to no model that kvshield has shielded"},
		"fingerprint": {func(o *session.Opened) { o.Fingerprint = []byte("another model's") }, "a graph with attention belongs to no model that kvshield has shielded"},
		"marker":      {func(o *session.Opened) { o.Marker = "absent" }, "a graph with attention belongs to no model that kvshield has shielded"},
		"layers":      {func(o *session.Opened) { o.Layers = 1 }, "the graph has a layer 1 but the model has 1"},
		"row":         {func(o *session.Opened) { o.RowFloats-- }, "the attention output of layer 0 has a shape that kvshield does not know"},
		"rotary base": {func(o *session.Opened) { o.RotaryBase = 5 }, fmt.Sprintf(rotary, base, dims, 5.0, dims)},
	} {
		t.Run(name, func(t *testing.T) {
			f := start(t, func(f *fake) { test.change(&f.opened) })
			r := runHost(t, f.socket(), demoModel, "load", "decode")
			// Some engines run a graph while they load, others with the first decode.
			r.expectDeath(t, strings.TrimSuffix(r.stdout, "decode"), test.want)
			if strings.Contains(r.stdout, "decode") {
				t.Errorf("it answered: %q", r.stdout)
			}
			f.expectFatal(t, test.want)
		})
	}
}

func TestRowThatDoesNotFitTheDataPlane(t *testing.T) {
	row := 4 * built.opened.RowFloats
	want := fmt.Sprintf("one row of the attention output (%d bytes) does not fit the data plane (%d bytes); start kvshield with a larger --data-plane-bytes", row, row-4)
	f := start(t, func(f *fake) { f.transport, f.capacity = session.Socket, row-4 })
	runHost(t, f.socket(), demoModel, "load", "decode").expectDeath(t, "load ok\n", want)
	f.expectFatal(t, want)
}

// The hook's counts are what the transitions were, and every duration lies in its bucket's bounds.
func TestMeter(t *testing.T) {
	f := start(t, func(f *fake) { f.inverter = slow{} })
	if r := runHost(t, f.socket(), demoModel, "load", "decode", "decode", "decode"); r.code != 0 {
		t.Fatalf("exit code %d\n%s", r.code, r.stderr)
	}
	f.waitGone(t)
	s := f.totals
	if n := uint64(3 * built.opened.Layers); s.Transitions != n || s.Bytes != n*3*4*uint64(built.opened.RowFloats) {
		t.Errorf("%d transitions of %d bytes in 3 decodes of 3 tokens over %d layers", s.Transitions, s.Bytes, built.opened.Layers)
	}
	var counted uint64
	for _, n := range s.Histogram {
		counted += n
	}
	if counted != s.Transitions {
		t.Errorf("%d transitions in the histogram, %d counted", counted, s.Transitions)
	}
	if least := s.Quantile(1 / float64(s.Transitions)); least < slowness || s.Quantile(1) < least || s.Wait < time.Duration(s.Transitions)*slowness {
		t.Errorf("from %v to %v, %v in all; each took at least %v", least, s.Quantile(1), s.Wait, slowness)
	}
}

const slowness = 2 * time.Millisecond

type slow struct{}

func (slow) Invert(_ enclave.ModelID, _ int, dst, src []float32) error {
	time.Sleep(slowness)
	copy(dst, src)
	return nil
}
