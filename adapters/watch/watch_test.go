package watch_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/adapters/watch"
)

func TestEnded(t *testing.T) {
	b := newBench(t)
	w := startWatch(t, b)
	for _, c := range []struct {
		name     string
		hooked   bool
		program  string
		way      string
		model    string
		cause    watch.Cause
		evidence string
		message  string
	}{
		{"static program maps", true, b.static, "map", b.big, watch.StaticProgram, "mapped", "BUILD_SHARED_LIBS=ON"},
		{"static program maps a small model", true, b.static, "map", b.small, watch.StaticProgram, "mapped", "statically linked"},
		{"static program reads", true, b.static, "read", b.big, watch.StaticProgram, "has read", "statically linked"},
		{"static program preads", true, b.static, "pread", b.big, watch.StaticProgram, "has read", "statically linked"},
		{"static engine reads a small model", true, b.engine, "read", b.small, watch.StaticProgram, "has read", "statically linked"},
		{"cleaned environment maps", false, b.dynamic, "map", b.big, watch.CleanedEnvironment, "mapped", "LD_PRELOAD"},
		{"cleaned environment reads", false, b.dynamic, "read", b.big, watch.CleanedEnvironment, "has read", "LD_PRELOAD"},
		{"embedded engine maps", true, b.embedded, "map", b.small, watch.EmbeddedEngine, "mapped", "kvshield-ollama"},
		{"embedded engine reads a small model", true, b.embedded, "read", b.small, watch.EmbeddedEngine, "has read", "kvshield-ollama"},
		{"other engine maps", true, b.dynamic, "map", b.big, watch.OtherEngine, "mapped", "libllama"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := w.start(t, c.hooked, nil, c.program, c.way, c.model).killed(t, w)
			if v.Cause != c.cause || v.Program != c.program || v.Model != c.model || !strings.Contains(v.Evidence, c.evidence) {
				t.Errorf("violation %+v", v)
			}
			text := v.Error()
			for _, part := range []string{c.message, c.program, c.model, "ended before it could answer"} {
				if !strings.Contains(text, part) {
					t.Errorf("message %q lacks %q", text, part)
				}
			}
			if strings.Contains(text, "\n") {
				t.Errorf("message %q has more than one line", text)
			}
		})
	}
}

func TestSurvives(t *testing.T) {
	b := newBench(t)
	w := startWatch(t, b)
	for _, c := range []struct {
		name    string
		hooked  bool
		program string
		way     string
		model   string
	}{
		{"header and a mebibyte", true, b.dynamic, "header", b.big},
		{"header and a mebibyte without the hook", false, b.dynamic, "header", b.big},
		{"header and a mebibyte in a static program", true, b.static, "header", b.big},
		{"header and a mebibyte in an embedded engine", true, b.embedded, "header", b.big},
		{"small model in chunks", true, b.dynamic, "chunk", b.small},
		{"big model's first chunk, repeatedly", true, b.dynamic, "chunk", b.big},
		{"another kind of file", true, b.static, "map", b.static},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.start(t, c.hooked, nil, c.program, c.way, c.model).survives(t, w)
		})
	}
}

func TestGreetedSurvives(t *testing.T) {
	b := newBench(t)
	w := startWatch(t, b)
	for _, way := range []string{"map", "read", "pread"} {
		w.start(t, true, w.greet, b.dynamic, way, b.big).survives(t, w)
	}
}

// A greeted host may fork, for a shell command for instance; the copy has the same mappings.
func TestForkOfGreetedSurvives(t *testing.T) {
	b := newBench(t)
	w := startWatch(t, b)
	w.start(t, true, w.greet, b.dynamic, "fork", b.small).survives(t, w)
}

func TestGrandchildThatForkedTwiceIsEnded(t *testing.T) {
	b := newBench(t)
	w := startWatch(t, b)
	h := w.start(t, false, nil, b.dynamic, "twice", b.big)
	v := w.violation(t)
	if v.PID == h.cmd.Process.Pid || v.Kill != nil || v.Model != b.big {
		t.Errorf("violation %+v, want the grandchild's", v)
	}
}

func TestQuickProcessesDoNotDisturb(t *testing.T) {
	b := newBench(t)
	w := startWatch(t, b)
	for range 50 {
		h := w.start(t, false, nil, b.static, "quick", b.small)
		if err := <-h.end; err != nil {
			t.Fatalf("a process that only opened the model ended with %v", err)
		}
		h.end <- nil
	}
	w.start(t, false, nil, b.static, "map", b.small).killed(t, w)
}

// What was read and closed while nobody looked shows in the command line and the counter.
func TestEngineThatHasClosedItsModelIsEnded(t *testing.T) {
	b := newBench(t)
	before := &watching{bench: b}
	h := before.start(t, true, nil, b.engine, "readclose", b.small)
	other := before.start(t, true, nil, b.dynamic, "readclose", b.small)
	<-h.done
	<-other.done
	w := startWatch(t, b)
	if v := h.killed(t, w); v.Model != b.small || !strings.Contains(v.Evidence, "command line") {
		t.Errorf("violation %+v", v)
	}
	other.survives(t, w)
}

func TestDiagnose(t *testing.T) {
	b := newBench(t)
	for program, want := range map[string]watch.Cause{
		b.static:              watch.StaticProgram,
		b.engine:              watch.StaticProgram,
		b.dynamic:             watch.Reachable,
		b.embedded:            watch.EmbeddedEngine,
		"testdata/script.txt": watch.Script,
		setuidCopy(t, b):      watch.SetuidProgram,
	} {
		if got, err := watch.Diagnose(program); err != nil || got != want {
			t.Errorf("%s: %v, %v; want %v", filepath.Base(program), got, err, want)
		}
	}
	for _, file := range []string{b.small, "testdata", filepath.Join(b.dir, "absent")} {
		if got, err := watch.Diagnose(file); err == nil {
			t.Errorf("%s: %v, want an error", file, got)
		}
	}
}
