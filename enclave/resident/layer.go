package resident

import (
	"errors"
	"fmt"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/attention"
)

// Limits of a declaration.
const (
	maxLayers  = 1024
	maxStreams = 256
)

// layer is the caches of one layer of a context, one for each stream.
type layer struct {
	number  int // for messages
	shape   attention.Shape
	cells   int // of one stream
	streams []*attention.Cache
	bytes   int64 // reserved
}

// newLayer checks a declaration; it takes no memory yet.
func newLayer(d enclave.LayerCache, storage *enclave.Storage) (*layer, error) {
	if storage != nil {
		d.Storage = *storage
	}
	l := &layer{number: d.Layer, cells: d.Cells,
		shape: attention.Shape{QueryHeads: d.QueryHeads, KVHeads: d.KVHeads, DimK: d.DimK, DimV: d.DimV}}
	switch d.Storage {
	case enclave.StorageF16:
		l.shape.Type = attention.F16
	case enclave.StorageF32:
		l.shape.Type = attention.F32
	case enclave.StorageQ8_0:
		l.shape.Type = attention.Q8_0
	default:
		return nil, l.misfit("storage %d is none of f16, f32, q8_0", d.Storage)
	}
	if d.Streams < 1 || d.Streams > maxStreams {
		return nil, l.misfit("%d streams: from 1 to %d", d.Streams, maxStreams)
	}
	stream, err := attention.Reserve(l.shape, d.Cells)
	if err != nil {
		return nil, l.wrap(err)
	}
	l.bytes = stream * int64(d.Streams)
	l.streams = make([]*attention.Cache, d.Streams)
	return l, nil
}

// open makes the empty caches.
func (l *layer) open() error {
	for i := range l.streams {
		c, err := attention.NewCache(l.shape, l.cells)
		if err != nil {
			return l.wrap(err)
		}
		l.streams[i] = c
	}
	return nil
}

func (l *layer) close() {
	for _, c := range l.streams {
		c.Close()
	}
}

// find returns the cache of a cell of the layer, and the cell's place in it.
func (l *layer) find(cell int64) (*attention.Cache, int64, error) {
	if cell < 0 || cell >= l.total() {
		return nil, 0, l.misfit("cell %d of %d", cell, l.total())
	}
	return l.streams[cell/int64(l.cells)], cell % int64(l.cells), nil
}

func (l *layer) total() int64 { return int64(l.cells) * int64(len(l.streams)) }

// each calls do for the part of n cells from first on that lies in each stream; at counts from first.
func (l *layer) each(first, n int64, do func(c *attention.Cache, place, n, at int64) error) error {
	if first < 0 || n < 0 || first > l.total()-n {
		return l.misfit("%d cells from %d of %d", n, first, l.total())
	}
	for at := int64(0); at < n; {
		place := (first + at) % int64(l.cells)
		part := min(n-at, int64(l.cells)-place)
		if err := do(l.streams[(first+at)/int64(l.cells)], place, part, at); err != nil {
			return err
		}
		at += part
	}
	return nil
}

func (l *layer) misfit(format string, a ...any) error {
	return fmt.Errorf("%w: layer %d: %s", enclave.ErrCache, l.number, fmt.Sprintf(format, a...))
}

// wrap says which layer an error of package attention is about, and that it is ErrCache where the request was wrong.
func (l *layer) wrap(err error) error {
	if err == nil {
		return nil
	}
	for _, wrong := range []error{attention.ErrShape, attention.ErrCell, attention.ErrLength, attention.ErrMask, attention.ErrParams, attention.ErrUnwritten} {
		if errors.Is(err, wrong) {
			return fmt.Errorf("%w: layer %d: %w", enclave.ErrCache, l.number, err)
		}
	}
	return fmt.Errorf("layer %d: %w", l.number, err)
}
