package secmem

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

var kinds = map[string]func(int) (*Region, error){Secret: newSecret, Locked: newAnonymous}

// each runs a test on a region of every kind that this machine has.
func each(t *testing.T, n int, test func(t *testing.T, r *Region)) {
	for kind, make := range kinds {
		t.Run(kind, func(t *testing.T) {
			r, err := make(n)
			if errors.Is(err, unix.ENOSYS) {
				t.Skipf("this machine has no %s memory: %v", kind, err)
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(r.Wipe)
			test(t, r)
		})
	}
}

func address(r *Region) int64 {
	return int64(uintptr(unsafe.Pointer(unsafe.SliceData(r.Bytes()))))
}

// readMem reads this process's memory as a debugger would.
func readMem(t *testing.T, at int64, n int) ([]byte, error) {
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	b := make([]byte, n)
	_, err = mem.ReadAt(b, at)
	return b, err
}

func TestSizes(t *testing.T) {
	for _, n := range []int{-1, 0, MaxSize + 1, int(^uint(0) >> 1)} {
		if r, err := New(n); !errors.Is(err, ErrSize) || r != nil {
			t.Errorf("New(%d) = %v, %v, want ErrSize", n, r, err)
		}
	}
	page := unix.Getpagesize()
	for _, n := range []int{1, 31, page, page + 1} {
		r, err := New(n)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Bytes()) != n || cap(r.Bytes()) != n {
			t.Errorf("New(%d) gave %d bytes, capacity %d", n, len(r.Bytes()), cap(r.Bytes()))
		}
		r.Wipe()
	}
}

func TestStartsZeroedAndKeepsWhatIsWritten(t *testing.T) {
	each(t, 5000, func(t *testing.T, r *Region) {
		if !bytes.Equal(r.Bytes(), make([]byte, 5000)) {
			t.Error("a fresh region is not zero")
		}
		copy(r.Bytes()[4990:], "key bytes")
		if got := string(r.Bytes()[4990:4999]); got != "key bytes" {
			t.Errorf("read back %q", got)
		}
	})
}

func TestNewTakesTheBestKind(t *testing.T) {
	want := Secret
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) {
		want = Locked
	} else if err == nil {
		unix.Close(fd)
	}
	r, err := New(32)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Wipe()
	if r.Kind() != want {
		t.Errorf("kind is %q, want %q", r.Kind(), want)
	}
}

// A second mapping of the same pages sees what the region left behind.
func TestWipeZeroesThePages(t *testing.T) {
	fd, err := unix.MemfdCreate("secmem-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	r, err := mapFile(fd, 64, Secret)
	if err != nil {
		t.Fatal(err)
	}
	witness, err := unix.Mmap(fd, 0, unix.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(witness)

	copy(r.Bytes(), strings.Repeat("k", 64))
	if witness[0] != 'k' || witness[63] != 'k' {
		t.Fatal("the witness does not see the region's pages")
	}
	r.Wipe()
	if !bytes.Equal(witness, make([]byte, len(witness))) {
		t.Error("key bytes are left in the pages after Wipe")
	}
}

func TestWipeUnmaps(t *testing.T) {
	each(t, 100, func(t *testing.T, r *Region) {
		at := address(r)
		if !mapped(t, at) {
			t.Fatal("the region is not in the process's memory map")
		}
		r.Wipe()
		if mapped(t, at) {
			t.Error("the region is still mapped after Wipe")
		}
		r.Wipe()
	})
}

// mapped asks the kernel about one address, without touching it.
func mapped(t *testing.T, at int64) bool {
	var resident byte
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(at), 1, uintptr(unsafe.Pointer(&resident)))
	if errno != 0 && errno != unix.ENOMEM {
		t.Fatalf("mincore: %v", errno)
	}
	return errno == 0
}

func TestUseAfterWipePanics(t *testing.T) {
	uses := map[string]func(*Region){
		"Bytes":   func(r *Region) { r.Bytes() },
		"Uint16s": func(r *Region) { r.Uint16s() },
		"Uint32s": func(r *Region) { r.Uint32s() },
	}
	for name, use := range uses {
		t.Run(name, func(t *testing.T) {
			r, err := New(8)
			if err != nil {
				t.Fatal(err)
			}
			r.Wipe()
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			use(r)
		})
	}
}

func TestDebuggerCannotReadSecretMemory(t *testing.T) {
	const key = "only for the enclave"
	each(t, len(key), func(t *testing.T, r *Region) {
		copy(r.Bytes(), key)
		got, err := readMem(t, address(r), len(key))
		if r.Kind() == Secret {
			if err == nil || bytes.Contains(got, []byte("enclave")) {
				t.Errorf("/proc/self/mem gave %q, %v", got, err)
			}
			return
		}
		// The contrast: the same reader does reach ordinary memory.
		if err != nil || string(got) != key {
			t.Errorf("/proc/self/mem gave %q, %v", got, err)
		}
	})
}

func TestStaysOutOfCoreFilesAndChildren(t *testing.T) {
	want := map[string][]string{
		Secret: {"dd", "lo", "dc"}, // not dumped, locked, not copied on fork
		Locked: {"dd", "lo", "wf"}, // not dumped, locked, wiped on fork
		Plain:  {"dd", "wf"},
	}
	each(t, 100, func(t *testing.T, r *Region) {
		flags := vmFlags(t, address(r))
		for _, flag := range want[r.Kind()] {
			if !strings.Contains(" "+flags+" ", " "+flag+" ") {
				t.Errorf("the %s mapping has flags %q, want %q among them", r.Kind(), flags, flag)
			}
		}
	})
}

func TestViews(t *testing.T) {
	each(t, 7, func(t *testing.T, r *Region) {
		words, longs := r.Uint16s(), r.Uint32s()
		if len(words) != 3 || len(longs) != 1 {
			t.Fatalf("7 bytes gave %d words and %d long words, want 3 and 1", len(words), len(longs))
		}
		words[0], words[1] = 0x1234, 0x1234
		if longs[0] != 0x12341234 {
			t.Errorf("views do not share memory: %#x", longs[0])
		}
	})
}

func TestViewRefusesUnalignedMemory(t *testing.T) {
	r, err := New(16)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Wipe()
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	view[uint32](r.Bytes()[2:])
}
