package supervisor

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/dataplane"
	"github.com/kvshield/kvshield/hooks/frame"
	"github.com/kvshield/kvshield/hooks/session"
)

func transition(t *testing.T, plane *os.File, model uint32) (frame.Header, float32) {
	t.Helper()
	r, err := dataplane.Map(plane)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	rows := make([]byte, 4)
	*(*float32)(unsafe.Pointer(&rows[0])) = 6
	h, back, err := r.Exchange(frame.Header{Type: frame.Invert, Model: model, Rows: 1, RowBytes: 4, Sequence: 1, Payload: 4}, rows, 0, patience)
	if err != nil {
		t.Fatal(err)
	}
	if len(back) < 4 {
		return h, 0
	}
	return h, *(*float32)(unsafe.Pointer(&back[0]))
}

func TestModelIsExchanged(t *testing.T) {
	s := start(t, nil)
	p, plane := greet(t, s)
	path := writeModel(t, filepath.Join(t.TempDir(), "m.gguf"), "llama", 1)
	id, f := p.shielded(path)

	original, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
	if err != nil || !bytes.Equal(got, append(original, trailer...)) {
		t.Errorf("%d bytes, %v; want the original's %d and the trailer", len(got), err, len(original))
	}
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("the shielded model can be written to: %v", err)
	}
	if h, v := transition(t, plane, id); v != 3 {
		t.Errorf("a transition: %v, %+v", v, h)
	}

	_, stranger := greet(t, s)
	if h, _ := transition(t, stranger, id); h.Status != frame.StatusUnknownModel {
		t.Errorf("another engine used the model: %+v", h)
	}
	again, _ := p.shielded(path)
	if again == id {
		t.Error("two loads share one number")
	}
	if e := s.Events(); e.Shielded != 2 || e.Passed != 0 || len(e.Refusals) != 0 {
		t.Errorf("%+v", e)
	}
}

func TestSocketTransport(t *testing.T) {
	s := start(t, func(c *Config) { c.Transport = session.Socket })
	p, plane := greet(t, s)
	id, _ := p.shielded(writeModel(t, filepath.Join(t.TempDir(), "m.gguf"), "llama", 1))
	b := make([]byte, frame.HeaderSize+4)
	frame.Header{Type: frame.Invert, Model: id, Rows: 1, RowBytes: 4, Sequence: 1, Payload: 4}.Encode(b)
	*(*float32)(unsafe.Pointer(&b[frame.HeaderSize])) = 6
	if _, err := plane.Write(b); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(plane, b); err != nil {
		t.Fatal(err)
	}
	h, err := frame.Decode(b, 4)
	if v := *(*float32)(unsafe.Pointer(&b[frame.HeaderSize])); err != nil || h.Type != frame.Reply || v != 3 {
		t.Errorf("%+v, %v, %v", h, v, err)
	}
}

func TestWhatIsNotShielded(t *testing.T) {
	s, dir := start(t, nil), t.TempDir()
	p, _ := greet(t, s)
	p.open(writeModel(t, filepath.Join(dir, "projector.gguf"), "pass", 1))
	if _, f := p.expect(msgOpened); f != nil {
		t.Error("a file to pass came with a descriptor")
	}
	text := filepath.Join(dir, "text.gguf")
	if err := os.WriteFile(text, []byte("no model"), 0o600); err != nil {
		t.Fatal(err)
	}
	orphan := writeModel(t, filepath.Join(dir, "s-00001-of-00002.gguf"), "llama", 2)
	badName := writeModel(t, filepath.Join(dir, "split.gguf"), "llama", 2)
	fifo := writeModel(t, filepath.Join(dir, "f-00001-of-00002.gguf"), "llama", 2)
	if err := unix.Mkfifo(filepath.Join(dir, "f-00002-of-00002.gguf"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		writeModel(t, filepath.Join(dir, "r.gguf"), "refused", 1): "an architecture that cannot be shielded",
		text:    "",
		orphan:  "a file of this model cannot be opened",
		badName: "expected NAME-00001-of-00002.gguf",
		fifo:    "it is a FIFO, not a regular file",
	} {
		p.open(path)
		if why, _ := p.expect(msgRefused); !strings.Contains(why, want) || why == "" {
			t.Errorf("%s: refused %q, want %q", filepath.Base(path), why, want)
		}
	}
	if e := s.Events(); e.Passed != 1 || len(e.Refusals) != 5 || e.Shielded != 0 {
		t.Errorf("%+v", e)
	}
}

func TestSplitModelIsShieldedAsOne(t *testing.T) {
	s, dir := start(t, nil), t.TempDir()
	p, _ := greet(t, s)
	var paths []string
	for i := range 3 {
		paths = append(paths, writeModel(t, filepath.Join(dir, fmt.Sprintf("m-%05d-of-00003.gguf", i+1)), "llama", 3))
	}
	first, _ := p.shielded(paths[0])
	for _, path := range paths[1:] {
		if id, _ := p.shielded(path); id != first {
			t.Errorf("%s is model %d, the first file is %d", filepath.Base(path), id, first)
		}
	}
}

// An engine names its files from where it is, not from where the supervisor is.
func TestRelativePathsAreTheEngines(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	first := writeModel(t, filepath.Join(dir, "m-00001-of-00002.gguf"), "llama", 2)
	writeModel(t, filepath.Join(dir, "m-00002-of-00002.gguf"), "llama", 2)
	child := exec.Command("sleep", "600")
	child.Dir = filepath.Join(dir, "sub")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = child.Process.Kill(); _ = child.Wait() }()
	model, err := os.Open(first)
	if err != nil {
		t.Fatal(err)
	}
	defer model.Close()
	e := engine{pid: child.Process.Pid}
	files, paths, err := openSources(modelPath{"../m-00001-of-00002.gguf", e.directory()}, model)
	defer closeAll(files)
	if err != nil || len(files) != 2 || paths[1] != "../m-00002-of-00002.gguf" {
		t.Errorf("%d files, %q, %v", len(files), paths, err)
	}
}

func TestEngineThatIsGoneIsForgotten(t *testing.T) {
	s := start(t, nil)
	p, _ := greet(t, s)
	id, _ := p.shielded(writeModel(t, filepath.Join(t.TempDir(), "m.gguf"), "llama", 1))
	if !s.Greeted(os.Getpid()) {
		t.Error("not greeted while connected")
	}
	p.say(msgFatal, "why it ends", nil)
	p.conn.Close()
	eventually(t, "the keys to be given back", func() bool { return !gone(s.RuntimeDir().Path(fmt.Sprintf("unloaded-%d", id))) })
	if s.Greeted(os.Getpid()) {
		t.Error("greeted after it was gone")
	}
	if e := s.Events(); len(e.Fatal) != 1 || e.Fatal[0] != "why it ends" {
		t.Errorf("%+v", e)
	}
}

func TestNotesAreBounded(t *testing.T) {
	s := start(t, nil)
	p, _ := greet(t, s)
	path := writeModel(t, filepath.Join(t.TempDir(), "r.gguf"), "refused", 1)
	for range maxNotes + 5 {
		p.open(path)
		p.expect(msgRefused)
	}
	if e := s.Events(); len(e.Refusals) != maxNotes {
		t.Errorf("%d refusals are kept", len(e.Refusals))
	}
}

// A graph of one transition, as a hook counts it: docs/protocol.md, "Meter".
func (p peer) compute() {
	p.t.Helper()
	le := binary.LittleEndian
	record := make([]byte, 64)
	le.PutUint16(record, 1)     // a graph
	le.PutUint32(record[4:], 3) // tokens
	le.PutUint64(record[16:], 9)
	le.PutUint32(record[24:], 1)
	le.PutUint64(record[56:], 1)
	for at, b := range map[int64][]byte{64: {1}, 4096: {1}, 4096 + 32*1024: record, 128: {1}} {
		if _, err := p.meter.WriteAt(b, at); err != nil {
			p.t.Fatal(err)
		}
	}
}

func TestCountsOutliveTheirEngine(t *testing.T) {
	s := start(t, nil)
	if list := s.Graphs(); len(list) != 0 {
		t.Fatalf("graphs of nobody: %+v", list)
	}
	p, _ := greet(t, s)
	p.compute()
	if n, layers := s.Totals().Transitions, s.Layers(); n != 1 || len(layers) != 1 || layers[0].Transitions != 1 {
		t.Errorf("%d transitions, layers %+v", n, layers)
	}
	p.conn.Close()
	eventually(t, "the engine to be gone", func() bool { return !s.Greeted(os.Getpid()) })
	if n := s.Totals().Transitions; n != 1 {
		t.Errorf("%d transitions after its end", n)
	}
	if list := s.Graphs(); len(list) != 1 || list[0].Tokens != 3 || list[0].End != 9 || list[0].PID != os.Getpid() {
		t.Errorf("graphs after its end: %+v", list)
	}
	if list := s.Graphs(); len(list) != 0 {
		t.Errorf("handed out twice: %+v", list)
	}
}

func TestDetailReachesEnginesThatAreThereAndThatCome(t *testing.T) {
	s := start(t, nil)
	wants := func(p peer, want byte) {
		t.Helper()
		b := make([]byte, 1)
		if _, err := p.meter.ReadAt(b, 192); err != nil || b[0] != want {
			t.Errorf("detail %d, %v; want %d", b[0], err, want)
		}
	}
	before, _ := greet(t, s)
	wants(before, 0)
	s.Detail(true)
	wants(before, 1)
	after, _ := greet(t, s)
	wants(after, 1)
	s.Detail(false)
	wants(after, 0)
}

func TestFinishChecksWhatTheEnclaveSays(t *testing.T) {
	source, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	if err := source.Truncate(100); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		copies []enclave.Copy
		sizes  []int64
		want   string
	}{
		"sizes":   {nil, nil, "sizes for another number of files"},
		"file":    {[]enclave.Copy{{File: 1, Length: 1}}, []int64{1}, "a copy for file 1 of 1"},
		"shorter": {[]enclave.Copy{{Length: 200}}, []int64{200}, "became shorter while it was copied"},
		"size":    {[]enclave.Copy{{Length: 100}}, []int64{101}, "has 100 bytes where 101 were expected"},
		"good":    {[]enclave.Copy{{Length: 40, To: 60}, {From: 40, Length: 60}}, []int64{100}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			outputs, err := memoryFiles(1)
			if err != nil {
				t.Fatal(err)
			}
			defer closeAll(outputs)
			_, err = finish(enclave.LoadResult{Copies: test.copies, OutputSizes: test.sizes}, []*os.File{source}, outputs)
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("finish: %v, want %q", err, test.want)
			}
		})
	}
}

func TestPiecesCoverTheRange(t *testing.T) {
	at := int64(10)
	for _, p := range pieces(enclave.Copy{From: 10, To: 20, Length: 3*pieceSize + 1}) {
		if p.From != at || p.To != at+10 || p.Length < 1 || p.Length > pieceSize {
			t.Fatalf("piece %+v at %d", p, at)
		}
		at += p.Length
	}
	if at != 10+3*pieceSize+1 {
		t.Errorf("covered to %d", at)
	}
}
