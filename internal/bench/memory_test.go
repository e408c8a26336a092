package bench

import (
	"fmt"
	"os"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"
)

const smaps = `55d0c0000000-55d0c0001000 r--p 00000000 fe:00 1234                       /opt/my engine/llama-server
Size:                  8 kB
Rss:                   8 kB
Pss:                   6 kB
Pss_Dirty:             2 kB
Anonymous:             2 kB
SwapPss:               1 kB
VmFlags: rd mr mw me sd
7f0000000000-7f0000100000 r--s 00000000 00:01 77                         /memfd:kvshield-model (deleted)
Pss:                 100 kB
Anonymous:             0 kB
SwapPss:               0 kB
7f0000100000-7f0000200000 r--s 00100000 00:01 77                         /memfd:kvshield-model (deleted)
Pss:                  20 kB
7f0000200000-7f0000300000 rw-s 00000000 00:01 78                         /memfd:kvshield-data-plane (deleted)
Pss:                   4 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
Pss:                  30 kB
Anonymous:            30 kB
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
Pss:                   0 kB
`

func TestParseSmaps(t *testing.T) {
	want := usage{held: (6 + 1 + 4 + 30) << 10, files: (6 - 2) << 10, copies: map[uint64]int64{77: 120 << 10}}
	if got := parseSmaps([]byte(smaps)); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestParseStatus(t *testing.T) {
	text := "Name:\tkvshield-enclav\nVmHWM:\t  900 kB\nVmRSS:\t   70 kB\nRssAnon:\t   40 kB\nRssFile:\t   20 kB\nRssShmem:\t   10 kB\nVmSwap:\t    5 kB\n"
	got := parseStatus([]byte(text))
	if got.held != 75<<10 || got.files != 20<<10 || !got.resident {
		t.Errorf("got %+v", got)
	}
}

func FuzzParseSmaps(f *testing.F) {
	f.Add([]byte(smaps))
	f.Add([]byte("Pss: 9223372036854775807 kB\n"))
	f.Add([]byte("0-1 r 0 0 18446744073709551615\nPss: -4 kB\n-"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if u := parseSmaps(text); u.copies == nil || u.resident {
			t.Errorf("got %+v", u)
		}
	})
}

// memoryFile makes a memory file as the supervisor does, holding so many bytes.
func memoryFile(t *testing.T, size int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("kvshield-model", unix.MFD_CLOEXEC)
	if err != nil {
		t.Skipf("no memory files on this machine: %v", err)
	}
	f := os.NewFile(uintptr(fd), "kvshield-model")
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	return f
}

// fakeShield is a shield whose enclave is gone: everything else of it is unused where it is used.
type fakeShield struct{ Shield }

func (fakeShield) EnclavePID() int { return 0 }

func TestSampleCountsACopyOnceMappedOrNot(t *testing.T) {
	const size = 8 << 20
	f := memoryFile(t, size)
	s := sampler{shield: fakeShield{}, blocks: map[uint64]int64{}}
	child := sleeper(t)
	check := func(state string) {
		t.Helper()
		if m := s.sample(child); m.copy < size || m.copy > size+1<<16 || m.engine <= 0 || m.supervisor <= 0 {
			t.Errorf("%s: got %+v, want a copy of %d bytes", state, m, size)
		}
	}
	check("open")
	mapped, err := unix.Mmap(int(f.Fd()), 0, size/2, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		t.Fatal(err)
	}
	check("open and half of it mapped")
	f.Close()
	check("mapped only")
	if err := unix.Munmap(mapped); err != nil {
		t.Fatal(err)
	}
	if m := s.sample(child); m.copy != 0 {
		t.Errorf("gone: got a copy of %d bytes", m.copy)
	}
}

func TestSampleOfStockLeavesThisProcessOut(t *testing.T) {
	s := sampler{blocks: map[uint64]int64{}}
	m := s.sample(sleeper(t))
	if m.supervisor != 0 || m.copy != 0 || m.engine <= 0 || m.total() != m.engine {
		t.Errorf("got %+v", m)
	}
}

func TestUsageOfAProcessThatIsGone(t *testing.T) {
	if u := readUsage(1 << 30); u.held != 0 || len(u.copies) != 0 {
		t.Errorf("got %+v", u)
	}
	if c := openCopies(1 << 30); len(c) != 0 {
		t.Errorf("got %v", c)
	}
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(fmt.Errorf("cannot write %s: %w", path, err))
	}
}
