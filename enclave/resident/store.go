package resident

import (
	"fmt"
	"sync"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/attention"
	"github.com/kvshield/kvshield/enclave/internal/secmem"
)

// store is one engine's caches. Its lock is held for a whole call, so Close waits for a running one.
type store struct {
	r      *Resident
	models func() []enclave.ModelID

	mu      sync.Mutex
	layers  map[enclave.CacheID]*layer
	slots   [enclave.Batches]batch
	scratch *secmem.Region
	closed  bool
}

// tooMuch is more than any machine has, and far from where sums overflow.
const tooMuch = 1 << 62

func (s *store) Declare(declared []enclave.LayerCache) (enclave.Reservation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return enclave.Reservation{}, errClosed
	}
	if len(declared) < 1 || len(declared) > maxLayers {
		return enclave.Reservation{}, fmt.Errorf("%w: %d layers: from 1 to %d", enclave.ErrCache, len(declared), maxLayers)
	}
	layers, need := make([]*layer, len(declared)), int64(0)
	for i, d := range declared {
		l, err := newLayer(d, s.r.storage)
		if err != nil {
			return enclave.Reservation{}, err
		}
		layers[i] = l
		need = min(need+l.bytes, tooMuch)
	}
	made, err := s.r.reserve(layers, need)
	if err != nil {
		return enclave.Reservation{}, err
	}
	for i, l := range layers {
		s.layers[made.First+enclave.CacheID(i)] = l
	}
	return made, nil
}

func (s *store) Release(id enclave.CacheID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, err := s.layer(id)
	if err != nil {
		return err
	}
	s.drop(id, l)
	return nil
}

// drop wipes first and gives back then, so that what is reserved is never less than what is used.
func (s *store) drop(id enclave.CacheID, l *layer) {
	l.close()
	delete(s.layers, id)
	s.r.release(id)
}

func (s *store) Clear(id enclave.CacheID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, err := s.layer(id)
	if err != nil {
		return err
	}
	for _, c := range l.streams {
		c.Clear()
	}
	return nil
}

func (s *store) Copy(id enclave.CacheID, from, to int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, err := s.layer(id)
	if err != nil {
		return err
	}
	if from < 0 || from >= len(l.streams) || to < 0 || to >= len(l.streams) {
		return l.misfit("stream %d to %d of %d", from, to, len(l.streams))
	}
	return l.wrap(l.streams[to].CopyFrom(l.streams[from]))
}

func (s *store) Keep(id enclave.CacheID, first, n int, keep []uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, err := s.layer(id)
	if err != nil {
		return err
	}
	if n < 0 || int64(n) > l.total() || len(keep) != (n+31)/32 {
		return l.misfit("%d words that say which of %d cells to keep", len(keep), n)
	}
	return l.each(int64(first), int64(n), func(c *attention.Cache, place, part, at int64) error {
		return l.wrap(c.Keep(place, part, window(keep, at, part)))
	})
}

// window returns n bits from bit `at` on.
func window(words []uint32, at, n int64) []uint32 {
	w := make([]uint32, (n+31)/32)
	for i := range w {
		from := at/32 + int64(i)
		bits := uint64(words[from])
		if from+1 < int64(len(words)) {
			bits |= uint64(words[from+1]) << 32
		}
		w[i] = uint32(bits >> (at % 32))
	}
	return w
}

func (s *store) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, l := range s.layers {
		s.drop(id, l)
	}
	s.giveBack()
	s.slots = [enclave.Batches]batch{}
	s.closed = true
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	delete(s.r.stores, s)
}

// layer finds a layer of this store. The caller holds the lock.
func (s *store) layer(id enclave.CacheID) (*layer, error) {
	if s.closed {
		return nil, errClosed
	}
	l := s.layers[id]
	if l == nil {
		return nil, fmt.Errorf("%w: no cache of this engine has number %d", enclave.ErrCache, id)
	}
	return l, nil
}
