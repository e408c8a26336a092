package gguf_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kvshield/kvshield/internal/gguf"
)

func TestOpenRefusesWhatIsNoFile(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path, says string
	}{
		{dir, "a directory"}, {fifo, "a FIFO"}, {"/dev/zero", "a device"}, {"/dev/null", "a device"},
	} {
		_, _, err := gguf.Open(c.path)
		checkSays(t, c.path, err, gguf.ErrNotGGUF, c.says)
		checkSays(t, c.path, err, gguf.ErrNotGGUF, c.path)
	}
}

func TestOpenNamesThePath(t *testing.T) {
	dir := t.TempDir()
	short := filepath.Join(dir, "short.gguf")
	if err := os.WriteFile(short, small(t)[:100], 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := gguf.Open(short)
	checkSays(t, "short", err, gguf.ErrTruncated, short)

	absent := filepath.Join(dir, "absent.gguf")
	_, _, err = gguf.Open(absent)
	checkSays(t, "absent", err, fs.ErrNotExist, absent)
}

func TestSplitPaths(t *testing.T) {
	three := []string{"m/q-00001-of-00003.gguf", "m/q-00002-of-00003.gguf", "m/q-00003-of-00003.gguf"}
	for _, c := range []struct {
		path  string
		count int
		want  []string
		says  string
	}{
		{"any name", 1, []string{"any name"}, ""},
		{three[0], 3, three, ""},
		{three[2], 3, three, ""},
		{"m-00001-of-00002-00002-of-00002.gguf", 2, []string{"m-00001-of-00002-00001-of-00002.gguf", "m-00001-of-00002-00002-of-00002.gguf"}, ""},
		{three[0], 2, nil, "number 1 of 3"},
		{"q-00000-of-00003.gguf", 3, nil, "number 0 of 3"},
		{"q-00004-of-00003.gguf", 3, nil, "number 4 of 3"},
		{"q.gguf", 3, nil, `"q.gguf", expected NAME-00001-of-00003.gguf`},
		{"q-1-of-3.gguf", 3, nil, "expected NAME"},
		{"q-00001-of-00003.gguf.part", 3, nil, "expected NAME"},
		{"q.gguf", 0, nil, "0 files"},
		{"q.gguf", -1, nil, "-1 files"},
		{"q.gguf", 1 << 40, nil, "1099511627776 files"},
	} {
		got, err := gguf.SplitPaths(c.path, c.count)
		if strings.Join(got, ",") != strings.Join(c.want, ",") {
			t.Errorf("%s of %d: got %v", c.path, c.count, got)
		}
		checkSays(t, c.path, err, gguf.ErrMalformed, c.says)
	}
}

func TestErrorNamesPlaceAndKind(t *testing.T) {
	err := &gguf.Error{Offset: 17, What: `key "k": array of arrays`, Err: gguf.ErrUnsupported}
	if got := err.Error(); got != `unsupported GGUF file: key "k": array of arrays (at byte 17)` {
		t.Errorf("got %q", got)
	}
	if !errors.Is(err, gguf.ErrUnsupported) || errors.Is(err, gguf.ErrMalformed) {
		t.Error("is another kind of error")
	}
}
