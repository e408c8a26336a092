package meter

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hook compiles the hook's own counting, once.
var hook = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "meter")
	if err != nil {
		return "", err
	}
	program := filepath.Join(dir, "hook")
	out, err := exec.Command("cc", "-Wall", "-Wno-format-security", "-pthread", "-I../core", "testdata/hook.c", "-o", program).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return program, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if program, err := hook(); err == nil {
		os.RemoveAll(filepath.Dir(program))
	}
	os.Exit(code)
}

// run has the hook obey commands over a meter's memory, which may be nil.
func run(t *testing.T, memory *os.File, commands ...string) string {
	t.Helper()
	program, err := hook()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	if memory != nil {
		cmd.ExtraFiles = []*os.File{memory}
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

func create(t *testing.T) (*os.File, *Meter) {
	t.Helper()
	f, err := Create()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	m, err := Map(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return f, m
}

func TestWhatTheHookCountsIsRead(t *testing.T) {
	f, m := create(t)
	m.Detail(true)
	noLayer := strconv.FormatUint(1<<32-1, 10)
	run(t, f, "transition 0 1 5000 4000 1",
		"begin 100", "transition "+noLayer+" 110 2000 900 16", "transition 0 120 3000 1000 64", "transition 2 130 3000 2000 64", "end 9000 3 0 2 5 1",
		"begin 10000", "transition 0 10010 3000 1000 32", "end 14000 1")
	first := Graph{Number: 1, Start: 100, End: 9000, Tokens: 3, Transitions: 3, Bytes: 144, Wait: 8000, Enclave: 3900, Parts: []Part{{0, 2}, {5, 1}},
		Detail: []Transition{{1<<32 - 1, 110, 2000, 900, 16}, {0, 120, 3000, 1000, 64}, {2, 130, 3000, 2000, 64}}}
	second := Graph{Number: 2, Start: 10000, End: 14000, Tokens: 1, Transitions: 1, Bytes: 32, Wait: 3000, Enclave: 1000,
		Detail: []Transition{{0, 10010, 3000, 1000, 32}}}
	if got := m.Graphs(); !reflect.DeepEqual(got, []Graph{first, second}) {
		t.Errorf("graphs\n%+v\nwant\n%+v\n%+v", got, first, second)
	}
	if got := m.Graphs(); len(got) != 0 {
		t.Errorf("read again: %+v", got)
	}
	total := Totals{Transitions: 5, Bytes: 177, Wait: 16000, Enclave: 8900}
	total.Histogram[17], total.Histogram[7], total.Histogram[11] = 1, 1, 3
	if got := m.Totals(); got != total {
		t.Errorf("totals %+v, want %+v", got, total)
	}
	layers := []Layer{{3, 97, 11000, 6000}, {}, {1, 64, 3000, 2000}}
	if got := m.Layers(); !reflect.DeepEqual(got, layers) {
		t.Errorf("layers %+v, want %+v", got, layers)
	}
}

func TestTransitionsAreToldOnlyWithDetail(t *testing.T) {
	f, m := create(t)
	run(t, f, "begin 1", "transition 0 1 2 1 4", "end 5 1")
	if got := m.Graphs(); len(got) != 1 || got[0].Detail != nil || got[0].Transitions != 1 {
		t.Errorf("%+v", got)
	}
}

func TestWithoutMemoryNothingIsCounted(t *testing.T) {
	run(t, nil, "begin 1", "transition 0 1 2 1 4", "end 5 1 0 1")
}

func TestManySequences(t *testing.T) {
	f, m := create(t)
	var want []Part
	line := "end 2 256"
	for i := range 256 {
		want = append(want, Part{i, 1})
		line += fmt.Sprintf(" %d 1", i)
	}
	run(t, f, "begin 1", line)
	if got := m.Graphs(); len(got) != 1 || !reflect.DeepEqual(got[0].Parts, want) {
		t.Errorf("%+v", got)
	}
}

// Whoever comes late is told how much is missing, and reads the rest right.
func TestLostGraphs(t *testing.T) {
	f, m := create(t)
	const graphs = records
	var commands []string
	for range graphs {
		commands = append(commands, "begin 1", "end 2 3 4 3")
	}
	run(t, f, commands...)
	got := m.Graphs()
	lost := m.Totals().Lost
	if len(got) == 0 || lost == 0 || uint64(len(got))+lost != graphs {
		t.Fatalf("%d graphs read and %d lost of %d", len(got), lost, graphs)
	}
	for i, g := range got {
		if g.Number != lost+uint64(i)+1 || i > 0 && !reflect.DeepEqual(g.Parts, []Part{{4, 3}}) {
			t.Fatalf("graph %d: %+v", i, g)
		}
	}
}

// The other end is not trusted: whatever lies in the ring is read without harm.
func FuzzGraphs(f *testing.F) {
	f.Add([]byte{kindGraph, 0}, uint64(1))
	f.Add([]byte{kindParts, 0, 255, 255}, uint64(1<<63))
	f.Add([]byte{kindTransition}, uint64(records))
	f.Fuzz(func(t *testing.T, text []byte, written uint64) {
		file, err := Create()
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		m, err := Map(file)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		copy(m.memory[offRing:], text)
		for i := range 8 {
			m.memory[offWritten+i] = byte(written >> (8 * i))
		}
		for _, g := range m.Graphs() {
			if g.Start < 0 || g.End < 0 || g.Wait < 0 || g.Enclave < 0 || len(g.Parts) > partsMax {
				t.Errorf("%+v", g)
			}
		}
		m.Graphs()
	})
}

func TestMapRefuses(t *testing.T) {
	regular, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer regular.Close()
	if err := regular.Truncate(size); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.MemfdCreate("test", unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	short := os.NewFile(uintptr(fd), "short")
	defer short.Close()
	_, _ = unix.FcntlInt(short.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK)
	other, _ := create(t)
	if _, err := other.WriteAt([]byte{version + 1}, 4); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		file *os.File
		want string
	}{"not sealed": {regular, "not sealed"}, "too short": {short, "another size"}, "of another version": {other, "another version"}} {
		if m, err := Map(test.file); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
}

func TestTotalsAdd(t *testing.T) {
	a, b := Totals{Transitions: 1, Bytes: 2, Wait: 3, Enclave: 4, Lost: 5}, Totals{Transitions: 10, Bytes: 20, Wait: 30, Enclave: 40, Lost: 50}
	b.Histogram[5] = 4
	a.Add(b)
	want := Totals{Transitions: 11, Bytes: 22, Wait: 33, Enclave: 44, Lost: 55}
	want.Histogram[5] = 4
	if a != want {
		t.Errorf("%+v", a)
	}
}

func TestQuantile(t *testing.T) {
	var none Totals
	if got := none.Quantile(0.5); got != 0 {
		t.Errorf("of nothing: %v", got)
	}
	var s Totals
	s.Histogram[0], s.Histogram[8], s.Histogram[Buckets-1] = 98, 1, 1
	for q, want := range map[float64]time.Duration{0.01: 1152, 0.5: 1152, 0.98: 1152, 0.99: 2304, 1: BucketEnd(Buckets - 1)} {
		if got := s.Quantile(q); got != want {
			t.Errorf("quantile %v: %d ns, want %d", q, got, want)
		}
	}
}

// The hook counts in C: its function is asked for the bucket of durations around every bound.
func TestHookPutsDurationsIntoTheSameBuckets(t *testing.T) {
	var asked []string
	var want []string
	ask := func(ns time.Duration, bucket int) {
		asked, want = append(asked, fmt.Sprintf("bucket %d", int64(ns))), append(want, strconv.Itoa(bucket))
	}
	ask(0, 0)
	ask(1023, 0)
	for i := range Buckets {
		start := time.Duration(1024)
		if i > 0 {
			start = BucketEnd(i - 1)
		}
		ask(start, i)
		ask((start+BucketEnd(i))/2, i)
		ask(BucketEnd(i)-1, i)
	}
	ask(BucketEnd(Buckets-1), Buckets-1)
	ask(1<<62, Buckets-1)
	got := strings.Fields(run(t, nil, asked...))
	if !reflect.DeepEqual(got, want) {
		t.Errorf("buckets\n%v\nwant\n%v", got, want)
	}
}
