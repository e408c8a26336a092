// Package meter is what an engine's hook counts: what each graph cost in transitions, bytes and time, and whose tokens it computed.
//
// The supervisor makes the memory with [Create] and sends its file to the hook, which writes; [Map] and [Meter.Graphs] read. The
// C end is hooks/core/meter.c, docs/protocol.md has the layout byte by byte. A graph costs its hook a few stores: nobody is woken.
//
// Limits: an engine can write anything here, so these figures are for information. A reader that does not come for
// long loses the oldest graphs, and is told how many.
package meter

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	magic   = 0x4d4d564b // "KVMM"
	version = 1

	layersMax  = 1024
	layerSize  = 32
	records    = 1 << 14 // of the ring
	recordSize = 64

	offTransitions = 64
	offWait        = 72
	offBytes       = 80
	offEnclave     = 88
	offWritten     = 128 // records, ever
	offDetail      = 192
	offHistogram   = 256
	offLayers      = 4096
	offRing        = offLayers + layersMax*layerSize
	size           = offRing + records*recordSize
)

// Totals of an engine process.
type Totals struct {
	Transitions uint64
	Bytes       uint64        // of payload, to the enclave
	Wait        time.Duration // from before rows leave the engine's buffer until the answer is back in it
	Enclave     time.Duration // of it, the enclave was at work
	Lost        uint64        // graphs that nobody read in time
	Histogram   Histogram     // of what each transition took
}

// Add adds another process's counts.
func (t *Totals) Add(o Totals) {
	t.Transitions += o.Transitions
	t.Bytes += o.Bytes
	t.Wait += o.Wait
	t.Enclave += o.Enclave
	t.Lost += o.Lost
	t.Histogram.Add(&o.Histogram)
}

// Quantile of the transitions' latency.
func (t *Totals) Quantile(q float64) time.Duration { return t.Histogram.Quantile(q) }

// Layer is the same of one layer.
type Layer struct {
	Transitions, Bytes uint64
	Wait, Enclave      time.Duration
}

// Add adds the counts of the same layer elsewhere.
func (l *Layer) Add(o Layer) {
	l.Transitions += o.Transitions
	l.Bytes += o.Bytes
	l.Wait += o.Wait
	l.Enclave += o.Enclave
}

// Meter is the memory of one engine process.
type Meter struct {
	memory []byte

	mu     sync.Mutex
	read   uint64 // records
	number uint64 // of the last graph
	lost   uint64
	parts  []Part // of the graph whose record comes next
	detail map[uint64][]Transition
}

// Create makes the anonymous file of a meter.
func Create() (*os.File, error) {
	fd, err := unix.MemfdCreate("kvshield-meter", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("cannot make the meter's memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "kvshield-meter")
	if err := initialise(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot make the meter's memory: %w", err)
	}
	return f, nil
}

func initialise(f *os.File) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	// An engine that could shrink the file could kill its reader with a bus error.
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return err
	}
	m, err := mapFile(f)
	if err != nil {
		return err
	}
	*m.word(0), *m.word(4), *m.word(8), *m.word(12) = magic, version, records, layersMax
	return m.Close()
}

// Map maps a meter's file.
func Map(f *os.File) (*Meter, error) {
	m, err := mapFile(f)
	if err != nil {
		return nil, err
	}
	if *m.word(0) != magic || *m.word(4) != version {
		m.Close()
		return nil, errors.New("the meter's memory is of another version")
	}
	return m, nil
}

func mapFile(f *os.File) (*Meter, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); err != nil || seals&unix.F_SEAL_SHRINK == 0 || info.Size() != size {
		return nil, errors.New("the meter's memory has another size, or is not sealed against shrinking")
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("cannot map the meter: %w", err)
	}
	return &Meter{memory: memory, detail: map[uint64][]Transition{}}, nil
}

// Close unmaps the meter, which must not be used afterwards.
func (m *Meter) Close() error { return unix.Munmap(m.memory) }

func (m *Meter) word(off int) *uint32 { return (*uint32)(unsafe.Pointer(&m.memory[off])) }
func (m *Meter) long(off int) uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(&m.memory[off])))
}
func (m *Meter) duration(off int) time.Duration { return time.Duration(m.long(off)) }

// Totals so far.
func (m *Meter) Totals() Totals {
	m.mu.Lock()
	lost := m.lost
	m.mu.Unlock()
	t := Totals{Transitions: m.long(offTransitions), Wait: m.duration(offWait), Bytes: m.long(offBytes), Enclave: m.duration(offEnclave), Lost: lost}
	for i := range t.Histogram {
		t.Histogram[i] = m.long(offHistogram + 8*i)
	}
	return t
}

// Layers returns the totals of each layer, up to the last that had a transition.
func (m *Meter) Layers() []Layer {
	var list []Layer
	for i := range layersMax {
		at := offLayers + i*layerSize
		l := Layer{Transitions: m.long(at), Wait: m.duration(at + 8), Enclave: m.duration(at + 16), Bytes: m.long(at + 24)}
		if l.Transitions == 0 {
			continue
		}
		for len(list) < i {
			list = append(list, Layer{})
		}
		list = append(list, l)
	}
	return list
}

// Detail has the hook write each transition of a graph from now on, or only the graph.
func (m *Meter) Detail(on bool) {
	value := uint32(0)
	if on {
		value = 1
	}
	atomic.StoreUint32(m.word(offDetail), value)
}
