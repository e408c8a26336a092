package vault

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/secmem"
	"github.com/kvshield/kvshield/enclave/internal/shield"
)

// ErrRows is returned for rows that cannot be the attention output of a layer of the model.
var ErrRows = errors.New("the rows do not fit the model")

// model is what is kept of a load.
type model struct {
	shape  shield.Shape
	layers int
	stride int // of the tables: the longest row
	print  string

	mu     sync.RWMutex   // held for reading while a table is in use
	mem    *secmem.Region // of tables
	tables []uint16       // one inverse table per layer; nil once wiped
}

func newModel(s shield.Shape, d *drawn) (*model, error) {
	m := &model{shape: s, layers: s.Layers, stride: s.RowFloats(), print: d.print}
	mem, err := secmem.New(2 * m.layers * m.stride)
	if err != nil {
		return nil, fmt.Errorf("no memory for the inverse permutation: %w", err)
	}
	m.mem, m.tables = mem, mem.Uint16s()
	for layer := range m.layers {
		d.permutation.Inverse(layer, m.table(layer))
	}
	return m, nil
}

func (m *model) table(layer int) []uint16 {
	at := layer * m.stride
	return m.tables[at : at+m.shape.RowOf(layer)]
}

func (m *model) wipe() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tables = nil
	m.mem.Wipe()
}

func (m *model) invert(layer int, dst, src []float32) error {
	if err := m.check(layer, dst, src); err != nil {
		return err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.tables == nil {
		return enclave.ErrUnknownModel
	}
	table := m.table(layer)
	for n := len(table); len(src) >= n; dst, src = dst[n:], src[n:] {
		gather(dst[:n], src[:n], table)
	}
	return nil
}

func gather(dst, src []float32, table []uint16) {
	dst = dst[:len(table)]
	for i, from := range table {
		dst[i] = src[from]
	}
}

func (m *model) check(layer int, dst, src []float32) error {
	switch {
	case layer < 0 || layer >= m.layers:
		return fmt.Errorf("%w: layer %d, it has %d", ErrRows, layer, m.layers)
	case len(src)%m.shape.RowOf(layer) != 0:
		return fmt.Errorf("%w: %d floats are no whole rows of %d", ErrRows, len(src), m.shape.RowOf(layer))
	case len(dst) != len(src):
		return fmt.Errorf("%w: %d floats in, room for %d", ErrRows, len(src), len(dst))
	case overlap(dst, src):
		return fmt.Errorf("%w: source and destination overlap", ErrRows)
	}
	return nil
}

// overlap looks at two slices of the same length.
func overlap(a, b []float32) bool {
	size := 4 * uintptr(len(a))
	x, y := uintptr(unsafe.Pointer(unsafe.SliceData(a))), uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	return x < y+size && y < x+size
}
