// Package dataplane carries frames between an engine and the enclave: shared memory with futexes, or a socket.
//
// The host makes a region with [Create] and hands its file to both ends. The enclave answers with [Region.Serve] or
// [ServeSocket]. The engine's end is C (hooks/core/channel.c); [Region.Exchange] is the same in Go, for tests and for
// measuring. docs/protocol.md has the memory layout byte by byte.
//
// The other end of a region is not trusted: what it says is copied out before it is checked, and rows are only ever
// used as numbers.
package dataplane

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/hooks/frame"
)

const (
	magic = 0x4d53564b // "KVSM"
	page  = 4096

	offRequest       = 64
	offEnclaveSleeps = 68
	offReply         = 128
	offEngineSleeps  = 132
)

// DefaultCapacity is the payload that one frame carries at most, in bytes.
const DefaultCapacity = 2 << 20

// ResidentCapacity is the same for mode resident, whose frames carry keys, values and queries of a whole batch.
const ResidentCapacity = 32 << 20

// Region is a data plane in shared memory: a control page, a request frame and a reply frame.
type Region struct {
	memory   []byte
	capacity uint32
	closed   atomic.Bool
}

// Size of the file for a capacity, in bytes.
func Size(capacity uint32) int64 { return page + 2*(page+int64(capacity)) }

// Create makes the anonymous file of a region. Capacity is a multiple of 4,096 bytes.
func Create(capacity uint32) (*os.File, error) {
	if capacity == 0 || capacity%page != 0 || capacity > 1<<30 {
		return nil, fmt.Errorf("data plane of %d bytes: it takes a multiple of %d up to 1 GiB", capacity, page)
	}
	fd, err := unix.MemfdCreate("kvshield-data-plane", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("cannot make the data plane's memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "kvshield-data-plane")
	if err := initialise(f, capacity); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func initialise(f *os.File, capacity uint32) error {
	if err := f.Truncate(Size(capacity)); err != nil {
		return fmt.Errorf("cannot make the data plane's memory: %w", err)
	}
	// A peer that could shrink the file could kill the other end with a bus error.
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return fmt.Errorf("cannot seal the data plane's memory: %w", err)
	}
	r, err := mapFile(f)
	if err != nil {
		return err
	}
	defer r.Close()
	*r.word(0), *r.word(4), *r.word(8) = magic, frame.Version, capacity
	return nil
}

// Map maps a region's file. It checks that the file is sealed against shrinking.
func Map(f *os.File) (*Region, error) {
	r, err := mapFile(f)
	if err != nil {
		return nil, err
	}
	if *r.word(0) != magic || *r.word(4) != frame.Version || *r.word(8) != r.capacity {
		r.Close()
		return nil, errors.New("the data plane's memory is of another version")
	}
	return r, nil
}

func mapFile(f *os.File) (*Region, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return nil, fmt.Errorf("the data plane's memory is not sealed against shrinking")
	}
	capacity := (info.Size()-page)/2 - page
	if capacity <= 0 || capacity > 1<<30 || Size(uint32(capacity)) != info.Size() || capacity%page != 0 {
		return nil, fmt.Errorf("a data plane cannot have %d bytes", info.Size())
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("cannot map the data plane: %w", err)
	}
	_ = unix.Madvise(m, unix.MADV_DONTDUMP) // best effort: rows are as public as the accelerator's memory
	return &Region{memory: m, capacity: uint32(capacity)}, nil
}

// Close unmaps the region. Serve must have returned.
func (r *Region) Close() error { return unix.Munmap(r.memory) }

func (r *Region) word(off int) *uint32 { return (*uint32)(unsafe.Pointer(&r.memory[off])) }
func (r *Region) requestFrame() []byte { return r.memory[page:][:frame.HeaderSize] }
func (r *Region) replyFrame() []byte   { return r.memory[2*page+int(r.capacity):][:frame.HeaderSize] }
func (r *Region) requestRows() []byte  { return r.memory[page+frame.HeaderSize:][:r.capacity] }
func (r *Region) replyRows() []byte {
	return r.memory[2*page+int(r.capacity)+frame.HeaderSize:][:r.capacity]
}

func futexWait(word *uint32, value uint32, timeout time.Duration) {
	t := unix.NsecToTimespec(timeout.Nanoseconds())
	unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(word)), 0, uintptr(value), uintptr(unsafe.Pointer(&t)), 0, 0)
}

func futexWake(word *uint32) {
	unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(word)), 1, 1, 0, 0, 0)
}

// await returns true once the word differs from value: after a spin of at most `spin`, then asleep, with
// `sleeps` raised so that the other end knows to wake us. It returns false after timeout.
func await(word, sleeps *uint32, value uint32, spin, timeout time.Duration) bool {
	start := time.Now()
	for spin > 0 && time.Since(start) < spin {
		for range 64 {
			if atomic.LoadUint32(word) != value {
				return true
			}
		}
	}
	atomic.StoreUint32(sleeps, 1)
	defer atomic.StoreUint32(sleeps, 0)
	for atomic.LoadUint32(word) == value {
		left := timeout - time.Since(start)
		if left <= 0 {
			return false
		}
		futexWait(word, value, left)
	}
	return true
}

func floats(b []byte) []float32 {
	return unsafe.Slice((*float32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}
