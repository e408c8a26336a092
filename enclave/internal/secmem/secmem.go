// Package secmem holds key material outside the Go heap, where the garbage collector neither
// copies it nor leaves old copies behind.
//
// Call [New] first, work on [Region.Bytes] (or Uint16s, Uint32s for tables), and call
// [Region.Wipe] when the keys are no longer needed. [Region.Kind] says what the kernel gave:
//
//   - [Secret]: memfd_secret. The pages have left the kernel's own map of memory. They cannot be
//     read through /proc/PID/mem, with ptrace, or from a core file, not even by root.
//   - [Locked]: anonymous memory that is never swapped, not in core files and zero in a forked
//     child. A debugger, and root, can read it.
//   - [Plain]: as Locked, but the limit on locked memory was too small: it may reach the swap.
//
// Limits: whoever controls the kernel reads all three. A region takes whole pages, and secret and
// locked ones count against RLIMIT_MEMLOCK, so put the tables of a model into one region. The
// kernel cannot do direct I/O or futexes on secret memory. A region that is dropped without Wipe
// stays mapped until the process ends.
//
// Promises: the memory starts zeroed and is aligned to a page. After Wipe its content is zero and
// its pages are gone; Wipe may be called again. Using a region after Wipe panics: an empty slice
// could pass for an empty key. The caller keeps Wipe apart from all other use of a region; a slice
// taken earlier must not be touched after it.
package secmem

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Kind says how well a region is kept.
const (
	Secret = "memfd_secret"
	Locked = "locked"
	Plain  = "plain"
)

// MaxSize is the largest region in bytes.
const MaxSize = 1 << 30

// ErrSize is returned for a region that is empty or larger than MaxSize.
var ErrSize = errors.New("size of secret memory out of range: ask for 1 byte to 1 GiB")

// Region is memory for key material.
type Region struct {
	pages []byte // the whole mapping; nil once wiped
	size  int
	kind  string
}

// New returns a zeroed region of n bytes, of the best kind that the kernel gives.
func New(n int) (*Region, error) {
	if n < 1 || n > MaxSize {
		return nil, fmt.Errorf("%w (%d bytes asked for)", ErrSize, n)
	}
	if r, err := newSecret(n); err == nil {
		return r, nil
	}
	return newAnonymous(n)
}

// Bytes returns the region's memory. It panics after Wipe.
func (r *Region) Bytes() []byte {
	if r.pages == nil {
		panic("secmem: region used after it was wiped")
	}
	return r.pages[:r.size:r.size]
}

// Kind returns Secret, Locked or Plain.
func (r *Region) Kind() string { return r.kind }

// Wipe zeroes the region and gives its pages back.
func (r *Region) Wipe() {
	if r.pages == nil {
		return
	}
	clear(r.pages)
	if err := unix.Munmap(r.pages); err != nil {
		panic("secmem: unmapping a region failed: " + err.Error())
	}
	r.pages = nil
}

// newSecret fails where the kernel has no memfd_secret, or RLIMIT_MEMLOCK is used up.
func newSecret(n int) (*Region, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_secret failed: %w", err)
	}
	// The mapping keeps the memory alive, and a descriptor is one way fewer to reach it.
	defer unix.Close(fd)
	return mapFile(fd, n, Secret)
}

// mapFile makes a region of an empty memory file.
func mapFile(fd, n int, kind string) (*Region, error) {
	size := pageAligned(n)
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, fmt.Errorf("sizing secret memory failed: %w", err)
	}
	pages, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping secret memory failed: %w", err)
	}
	// The mapping is shared: without this a forked child would keep the keys.
	if err := unix.Madvise(pages, unix.MADV_DONTFORK); err != nil {
		_ = unix.Munmap(pages)
		return nil, fmt.Errorf("keeping secret memory out of children failed: %w", err)
	}
	return &Region{pages: pages, size: n, kind: kind}, nil
}

func newAnonymous(n int) (*Region, error) {
	pages, err := unix.Mmap(-1, 0, pageAligned(n), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("mapping %d bytes for keys failed, free some memory: %w", n, err)
	}
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_WIPEONFORK} {
		if err := unix.Madvise(pages, advice); err != nil {
			_ = unix.Munmap(pages)
			return nil, fmt.Errorf("keeping keys out of core files and children failed: %w", err)
		}
	}
	kind := Locked
	if unix.Mlock(pages) != nil {
		kind = Plain
	}
	return &Region{pages: pages, size: n, kind: kind}, nil
}

func pageAligned(n int) int {
	page := unix.Getpagesize()
	return (n + page - 1) / page * page
}
