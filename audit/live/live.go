// Package live reads dumps of a running engine's memory, as its hook writes them for an audit (docs/protocol.md, section 5).
//
// Start with [Read]; [Dump.Snapshot] makes a snapshot for the attacks. Limits: caches of one stream, elements F32, F16, BF16 and Q8_0. Promises:
// hostile input yields an error; memory stays within a small multiple of the dump.
package live

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/audit/element"
	"github.com/kvshield/kvshield/internal/gguf"
)

// What is wrong with a dump, as errors.Is tells.
var (
	ErrMalformed   = errors.New("malformed dump")
	ErrUnsupported = errors.New("dump of a cache of a kind that is not understood")
)

const (
	magic      = 0x4453564b // "KVSD"
	version    = 1
	recordSize = 128
	recordsMax = 1 << 14
	readBlock  = 1 << 20

	kindEnd    = 0
	kindCache  = 1
	kindWeight = 2
	kindBuffer = 3

	flagTransposed = 1
)

// Tensor as it lies in the engine's memory. Data is nil where it could not be read.
type Tensor struct {
	Name string
	Type gguf.Type
	Dims [4]int64
	Data []byte
}

// Dump of an engine's memory.
type Dump struct {
	Transposed bool // values are stored by dimension: flash attention is off
	Cache      []Tensor
	Weights    []Tensor
	Buffers    []Tensor // compute buffers, as bytes
}

// Read reads a whole dump.
func Read(r io.Reader) (*Dump, error) {
	var head [16]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fmt.Errorf("%w: no header", ErrMalformed)
	}
	le := binary.LittleEndian
	flags := le.Uint32(head[8:])
	if le.Uint32(head[:]) != magic || le.Uint32(head[4:]) != version || flags > flagTransposed {
		return nil, fmt.Errorf("%w: not a dump of version %d", ErrMalformed, version)
	}
	d := &Dump{Transposed: flags&flagTransposed != 0}
	for range recordsMax {
		kind, t, err := readRecord(r)
		switch {
		case err != nil:
			return nil, err
		case kind == kindEnd:
			return d, nil
		case kind == kindCache:
			d.Cache = append(d.Cache, t)
		case kind == kindWeight:
			d.Weights = append(d.Weights, t)
		case kind == kindBuffer:
			d.Buffers = append(d.Buffers, t)
		default:
			return nil, fmt.Errorf("%w: a record of kind %d", ErrMalformed, kind)
		}
	}
	return nil, fmt.Errorf("%w: more than %d records", ErrMalformed, recordsMax)
}

func readRecord(r io.Reader) (kind uint32, t Tensor, err error) {
	var b [recordSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, t, fmt.Errorf("%w: it ends before its end record", ErrMalformed)
	}
	le := binary.LittleEndian
	t.Type = gguf.Type(le.Uint32(b[4:]))
	for i := range t.Dims {
		t.Dims[i] = int64(le.Uint64(b[8+8*i:]))
	}
	name, _, _ := strings.Cut(string(b[48:112]), "\x00")
	t.Name = name
	t.Data, err = take(r, le.Uint64(b[40:]))
	return le.Uint32(b[:]), t, err
}

// take believes a length only as far as there are bytes.
func take(r io.Reader, n uint64) ([]byte, error) {
	if n > math.MaxInt64 {
		return nil, fmt.Errorf("%w: a record of %d bytes", ErrMalformed, n)
	}
	var data []byte
	for n > 0 {
		block := make([]byte, min(n, max(readBlock, uint64(len(data)))))
		if _, err := io.ReadFull(r, block); err != nil {
			return nil, fmt.Errorf("%w: %d bytes of a record are missing", ErrMalformed, n)
		}
		data = append(data, block...)
		n -= uint64(len(block))
	}
	return data, nil
}

// Snapshot is the cache of a dump: the cells that hold anything, in the order of the cells. Where the positions of the cells
// are not in a dump, that is the order in which one conversation filled them.
func (d *Dump) Snapshot(layers, headsKV int) (*audit.Snapshot, error) {
	s := &audit.Snapshot{Source: audit.LiveCache, HeadsKV: headsKV}
	for i := range layers {
		k, kind, err := d.matrix(fmt.Sprintf("cache_k_l%d", i), false)
		if err != nil {
			return nil, err
		}
		v, _, err := d.matrix(fmt.Sprintf("cache_v_l%d", i), d.Transposed)
		if err != nil {
			return nil, err
		}
		s.Type = kind
		s.Layers = append(s.Layers, audit.Layer{K: k, V: v})
	}
	if err := s.Check(); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrUnsupported, err)
	}
	if n := used(s); n > 0 {
		return s.First(n), nil
	}
	return s, nil // nothing but zeros
}

// Zero says how many bytes of cache there are, and whether all of them are zero.
func (d *Dump) Zero() (bytes int, zero bool) {
	zero = true
	for _, t := range d.Cache {
		bytes += len(t.Data)
		for _, b := range t.Data {
			zero = zero && b == 0
		}
	}
	return bytes, zero && bytes > 0
}

func (d *Dump) matrix(name string, transposed bool) (audit.Matrix, string, error) {
	for _, t := range d.Cache {
		if t.Name != name {
			continue
		}
		m, err := t.floats()
		if err == nil && transposed {
			m = turned(m)
		}
		return m, t.Type.String(), err
	}
	return audit.Matrix{}, "", fmt.Errorf("%w: it has no %s", ErrUnsupported, name)
}

func (t *Tensor) floats() (audit.Matrix, error) {
	elements, bytes, known := t.Type.Block()
	cols, rows := t.Dims[0], t.Dims[1]
	switch {
	case len(t.Data) == 0:
		return audit.Matrix{}, fmt.Errorf("%w: %s cannot be read back from where it lies", ErrUnsupported, t.Name)
	case !known || !element.Known(t.Type) || t.Dims[2] != 1 || t.Dims[3] != 1:
		return audit.Matrix{}, fmt.Errorf("%w: %s of type %v and shape %v", ErrUnsupported, t.Name, t.Type, t.Dims)
	case cols <= 0 || rows <= 0 || cols > math.MaxInt32 || rows > math.MaxInt32 || cols%elements != 0 || cols/elements*bytes*rows != int64(len(t.Data)):
		return audit.Matrix{}, fmt.Errorf("%w: %s has %d bytes for shape %v", ErrMalformed, t.Name, len(t.Data), t.Dims)
	}
	m := audit.NewMatrix(int(rows), int(cols))
	element.Floats(m.Data, t.Type, t.Data)
	return m, nil
}

// turned rearranges a cache that holds a row of all cells for each dimension.
func turned(m audit.Matrix) audit.Matrix {
	out := audit.NewMatrix(m.Rows, m.Cols)
	for c := range m.Rows {
		for i := range m.Cols {
			out.Data[c*m.Cols+i] = m.Data[i*m.Rows+c]
		}
	}
	return out
}

// used is the number of cells up to the last one that holds anything.
func used(s *audit.Snapshot) int {
	for n := s.Tokens(); n > 0; n-- {
		for _, l := range s.Layers {
			for _, row := range [][]float32{l.K.Row(n - 1), l.V.Row(n - 1)} {
				for _, v := range row {
					if v != 0 {
						return n
					}
				}
			}
		}
	}
	return 0
}
