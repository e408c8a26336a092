package watch

import (
	"bytes"
	"errors"
	"os/exec"
	"strings"
	"testing"
)

func TestParseStat(t *testing.T) {
	rest := " S 12 1 1 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 998877 1000 200 18446744073709551615 1 2 140700000 0 0\n"
	for _, name := range []string{"(sh)", "(a b)", "(a) R 1 (b)", "()"} {
		s, err := parseStat([]byte("77 " + name + rest))
		if err != nil || s != (stat{parent: 12, start: 998877, stack: 140700000}) {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	for _, text := range []string{"", "77 (sh)", "77 (sh) S x 1 1 0 -1", strings.Replace("77 (sh)"+rest, "998877", "-1", 1)} {
		if s, err := parseStat([]byte(text)); !errors.Is(err, errStat) {
			t.Errorf("%q: %+v, %v; want %v", text, s, err, errStat)
		}
	}
}

func TestParseMapping(t *testing.T) {
	m, ok := parseMapping([]byte("7f00-8f00 r-xp 00002000 fe:01 42        /a b/model (deleted)"))
	want := mapping{addresses: "7f00-8f00", length: 0x1000, offset: 0x2000, runnable: true,
		file: mapID{"fe:01", 42}, path: "/a b/model (deleted)"}
	if !ok || m != want {
		t.Errorf("%+v, %v; want %+v", m, ok, want)
	}
	for _, line := range []string{
		"", "7f00-8f00", "7f00-8f00 rw-p 00000000 00:00 0 ", "7f00-8f00 rw-p 00000000 00:00 0 [heap]",
		"8f00-7f00 r--p 00000000 fe:01 42 /m", "7f00 r--p 00000000 fe:01 42 /m", "7f00-8f00 r--p zz fe:01 42 /m",
		"7f00-8f00 r--p 00000000 fe:01 x /m",
	} {
		if m, ok := parseMapping([]byte(line)); ok {
			t.Errorf("%q: %+v, want nothing", line, m)
		}
	}
}

func TestStackEnd(t *testing.T) {
	for text, want := range map[string]string{
		"1-2 r--p 0 fe:01 4 /m\n7ffc1-7ffd2 rw-p 0 00:00 0    [stack]\n7ffe-7fff r-xp 0 00:00 0 [vdso]\n": "7ffd2",
		"1-2 r--p 0 fe:01 4 /m\n": "", "": "", "[stack]": "", "x [stack]": "x",
	} {
		if got := stackEnd([]byte(text)); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("7f00-8f00 r-xp 00002000 fe:01 42 /model"))
	f.Add([]byte("77 (sh) S 12 1 1 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 998877 1000 200 1 1 2 140700000 0 0\n"))
	f.Add([]byte("0-0 0 0 0 00"))
	f.Add([]byte("rchar: 12\nwchar: 1\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if m, ok := parseMapping(text); ok && (m.length < 0 || m.offset < 0 || m.file.inode == 0) {
			t.Errorf("%+v", m)
		}
		parseStat(text)
		stackEnd(text)
		number(text, "rchar")
	})
}

func TestReadingLeast(t *testing.T) {
	for _, c := range []struct {
		name string
		r    reading
		want int64
	}{
		{"nothing", reading{from: 100, before: 100, now: 100}, 0},
		{"counted since the first sight", reading{from: 100, before: 90, now: 150}, 50},
		{"read before the first sight", reading{from: 100, before: 10, now: 100, pos: 90}, 90},
		{"only sought to the end", reading{from: 100, before: 95, now: 100, pos: 1 << 30}, 5},
		{"other files before the first sight", reading{from: 100, before: 10, now: 100, pos: 3}, 3},
	} {
		if got := c.r.least(); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

func TestFollowKeepsAClosedModelUntilItWasJudged(t *testing.T) {
	p, m := &process{reading: map[*model]*reading{}}, &model{}
	look := func(read int64, open, judged bool) *reading {
		p.print.read = read
		models := map[*model]int64{}
		if open {
			models[m] = 0
		}
		p.follow(models, judged)
		return p.reading[m]
	}
	look(100, true, true)
	for _, step := range []struct {
		read         int64
		open, judged bool
		want         int64
	}{
		{150, true, true, 50},
		{180, false, true, 80},  // what was read until it was seen closed counts
		{500, false, false, 80}, // not what was read after
		{600, true, true, 0},    // opened anew: a reading of its own
	} {
		if r := look(step.read, step.open, step.judged); r == nil || r.least() != step.want {
			t.Fatalf("after %d bytes: %+v, want %d", step.read, r, step.want)
		}
	}
	look(700, false, true)
	if r := look(700, false, true); r != nil {
		t.Errorf("%+v is kept after it was judged", r)
	}
}

func TestLoading(t *testing.T) {
	for data, want := range map[int64]int64{
		0: 0, 1000: 500, 128 << 10: 64 << 10, 640 << 10: 64 << 10, 64 << 20: 64 << 20 / 10, 10 << 30: 1 << 30,
	} {
		if got := loading(data); got != want {
			t.Errorf("loading(%d) = %d, want %d", data, got, want)
		}
	}
}

func TestContainsFindsAMarkAcrossBlocks(t *testing.T) {
	mark := ggmlMarks[0]
	for _, at := range []int{0, 1, 256<<10 - 5, 256<<10 - 1, 256 << 10, 2*(256<<10) - 70} {
		text := append(bytes.Repeat([]byte{'x'}, at), mark...)
		if !contains(bytes.NewReader(text), ggmlMarks) {
			t.Errorf("not found at %d", at)
		}
		if contains(bytes.NewReader(text[:len(text)-1]), ggmlMarks) {
			t.Errorf("found at %d, where it is cut short", at)
		}
	}
}

func TestKillSparesAnotherProcess(t *testing.T) {
	cmd := exec.Command("sleep", "3600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	self, err := readStat(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := kill(pid, self.start+1); !errors.Is(err, errReplaced) {
		t.Errorf("%v, want %v", err, errReplaced)
	}
	if err := kill(pid, self.start); err != nil {
		t.Error(err)
	}
	cmd.Wait()
	if err := kill(pid, self.start); !errors.Is(err, errReplaced) {
		t.Errorf("%v after its end, want %v", err, errReplaced)
	}
}

func TestMessages(t *testing.T) {
	v := Violation{PID: 7, Program: "/bin/engine", Model: "/m.gguf", Evidence: "has 1.1 GiB of it mapped",
		Cause: StaticProgram, Kill: errors.New("operation not permitted")}
	for _, part := range []string{"could NOT be ended", "operation not permitted", "end it by hand"} {
		if !strings.Contains(v.Error(), part) {
			t.Errorf("%q lacks %q", v.Error(), part)
		}
	}
	for c := StaticProgram; c <= Script; c++ {
		if strings.HasPrefix(c.String(), "cause ") || c.Remedy() == "" {
			t.Errorf("cause %d has no name or no remedy", int(c))
		}
	}
	for n, want := range map[int64]string{12: "12 bytes", 64 << 20: "64 MiB", 1181116006: "1.1 GiB", 1536: "1.5 KiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}
