package resident

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/kvshield/kvshield/enclave"
)

type sealer struct {
	state
	number uint64 // of the next record
	ended  bool
}

var errEnded = errors.New("the saved state has ended, begin another one")

// Sealer draws the id of a new state; its key is derived from that.
func (s *store) Sealer() (enclave.Sealer, error) {
	made := &sealer{state: state{s: s}}
	if err := s.newHeader(&made.header); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	if err := made.derive(); err != nil {
		return nil, err
	}
	return made, nil
}

func (w *sealer) Header() []byte {
	h := w.header
	return h[:]
}

func (w *sealer) Text(dst, text []byte) ([]byte, error) {
	return w.record(dst, recordText, len(text), func(to []byte) error {
		copy(to, text)
		return nil
	})
}

func (w *sealer) Cells(dst []byte, id enclave.CacheID, cells []int64) ([]byte, error) {
	w.s.mu.Lock()
	l, err := w.s.layer(id)
	w.s.mu.Unlock()
	if err != nil {
		return dst, err
	}
	if int64(len(cells)) > l.total() {
		return dst, l.misfit("%d cells to save of %d", len(cells), l.total())
	}
	size := l.shape.CellBytes()
	return w.record(dst, recordCells, cellsHeader+len(cells)*size, func(to []byte) error {
		l.describe(to, len(cells))
		to = to[cellsHeader:]
		for i, cell := range cells {
			c, place, err := l.find(cell)
			if err == nil {
				err = l.wrap(c.Export(place, to[i*size:][:size]))
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// describe writes the head of a cells record.
func (l *layer) describe(to []byte, count int) {
	for i, n := range []int{int(l.shape.Type), l.shape.KVHeads, l.shape.DimK, l.shape.DimV, count} {
		binary.LittleEndian.PutUint32(to[4*i:], uint32(n))
	}
}

func (w *sealer) End(dst []byte) ([]byte, error) {
	dst, err := w.record(dst, recordEnd, 8, func(to []byte) error {
		binary.LittleEndian.PutUint64(to, w.number)
		return nil
	})
	w.ended = w.ended || err == nil
	return dst, err
}

// record seals n bytes that write fills in.
func (w *sealer) record(dst []byte, kind recordKind, n int, write func(to []byte) error) ([]byte, error) {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	switch {
	case w.s.closed:
		return dst, errClosed
	case w.ended:
		return dst, errEnded
	case n > maxText:
		return dst, fmt.Errorf("%w: a record of %d bytes, more than %d", enclave.ErrCache, n, maxText)
	}
	buf, err := w.s.secret(n + tagBytes)
	if err != nil {
		return dst, err
	}
	defer func() { w.s.done(buf) }()
	if err := write(buf[:n]); err != nil {
		return dst, err
	}
	dst = w.seal(dst, kind, w.number, buf, n)
	w.number++
	return dst, nil
}
