package resident

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/attention"
	"github.com/kvshield/kvshield/enclave/internal/secmem"
)

// Options of a Resident. The zero value is usable.
type Options struct {
	Limit   int64                                  // bytes of keys and values that all stores may reserve; 0: half of the machine's memory
	Storage *enclave.Storage                       // how all of them are kept; nil: as each layer asks
	Threads int                                    // that compute attention; 0: one for each CPU
	Random  io.Reader                              // nil: the system's generator
	Digest  func(enclave.ModelID) ([32]byte, bool) // what a model is told by in sealed states; nil: states cannot be sealed
}

// Resident is the keeper of all engines' caches. Its methods may be called by several goroutines.
type Resident struct {
	limit   int64
	storage *enclave.Storage
	digest  func(enclave.ModelID) ([32]byte, bool)
	pool    *attention.Pool

	mu       sync.Mutex // a store's lock is taken first
	random   io.Reader
	root     *secmem.Region // the key that those of sealed states are derived from
	stores   map[*store]struct{}
	layers   map[enclave.CacheID]*layer // of all stores
	reserved int64
	last     enclave.CacheID
	closed   bool
}

var _ enclave.Keeper = (*Resident)(nil)

var errClosed = errors.New("the store of this engine's KV cache is closed")

// New draws the key for sealed states and starts the threads. Close it.
func New(o Options) (*Resident, error) {
	if o.Limit < 0 || o.Threads < 0 || o.Storage != nil && *o.Storage > enclave.StorageQ8_0 {
		return nil, fmt.Errorf("enclave memory of %d bytes, %d threads: neither may be negative, and storage is f16, f32 or q8_0", o.Limit, o.Threads)
	}
	if o.Limit == 0 {
		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err != nil {
			return nil, fmt.Errorf("the machine does not say how much memory it has, give a limit: %w", err)
		}
		o.Limit = int64(min(uint64(info.Totalram)*uint64(info.Unit)/2, math.MaxInt64))
	}
	if o.Threads == 0 {
		o.Threads = runtime.NumCPU()
	}
	if o.Random == nil {
		o.Random = rand.Reader
	}
	root, err := newRoot(o.Random)
	if err != nil {
		return nil, err
	}
	return &Resident{
		limit: o.Limit, storage: o.Storage, digest: o.Digest, random: o.Random, root: root,
		pool:   attention.NewPool(o.Threads),
		stores: map[*store]struct{}{}, layers: map[enclave.CacheID]*layer{},
	}, nil
}

// OpenStore returns an empty store for one engine process.
func (r *Resident) OpenStore(models func() []enclave.ModelID) enclave.Store {
	s := &store{r: r, models: models, layers: map[enclave.CacheID]*layer{}}
	r.mu.Lock()
	defer r.mu.Unlock()
	s.closed = r.closed
	if !r.closed {
		r.stores[s] = struct{}{}
	}
	return s
}

// Usage returns what all stores together have reserved, use and may reserve, in bytes, and how the kernel keeps what is used:
// secmem's kinds and the bytes of each.
func (r *Resident) Usage() (reserved, used, limit int64, kinds map[string]int64) {
	r.mu.Lock()
	reserved = r.reserved
	layers := make([]*layer, 0, len(r.layers))
	for _, l := range r.layers {
		layers = append(layers, l)
	}
	r.mu.Unlock()
	kinds = map[string]int64{}
	for _, l := range layers {
		for _, c := range l.streams {
			for kind, n := range c.Kinds() {
				kinds[kind] += n
				used += n
			}
		}
	}
	return reserved, used, r.limit, kinds
}

// Level names the instructions that attention is computed with.
func (r *Resident) Level() string { return attention.Level() }

// Threads returns how many threads share a call's attention.
func (r *Resident) Threads() int { return r.pool.Threads() }

// Close closes all stores, waiting for running calls, and wipes the key: sealed states become unreadable.
func (r *Resident) Close() {
	r.mu.Lock()
	r.closed = true
	stores := make([]*store, 0, len(r.stores))
	for s := range r.stores {
		stores = append(stores, s)
	}
	r.mu.Unlock()
	for _, s := range stores {
		s.Close()
	}
	r.pool.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.root.Wipe()
}

// reserve takes memory for layers and gives them numbers.
func (r *Resident) reserve(layers []*layer, need int64) (enclave.Reservation, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	made := enclave.Reservation{Need: need, Reserved: r.reserved, Limit: r.limit}
	switch {
	case r.closed:
		return enclave.Reservation{}, errClosed
	case need > r.limit-r.reserved:
		return enclave.Reservation{}, &enclave.MemoryError{Reservation: made}
	case math.MaxUint32-uint32(r.last) < uint32(len(layers)):
		return enclave.Reservation{}, errors.New("the enclave has no numbers left for caches, start it anew")
	}
	for _, l := range layers {
		if err := l.open(); err != nil {
			return enclave.Reservation{}, err
		}
	}
	made.First = r.last + 1
	for _, l := range layers {
		r.last++
		r.layers[r.last] = l
		r.reserved += l.bytes
	}
	return made, nil
}

// release forgets a layer whose memory is gone.
func (r *Resident) release(id enclave.CacheID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.layers[id]; l != nil {
		r.reserved -= l.bytes
		delete(r.layers, id)
	}
}
