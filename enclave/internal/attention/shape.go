package attention

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
)

// Storage says how keys and values are kept.
type Storage int

const (
	F16  Storage = iota // rounded to nearest even, 2 bytes an element; ggml's default
	F32                 // as they come
	Q8_0                // ggml's blocks of 32 with one F16 scale, 34 bytes a block; a dimension's last block may be short
)

func (s Storage) String() string {
	switch s {
	case F16:
		return "f16"
	case F32:
		return "f32"
	case Q8_0:
		return "q8_0"
	}
	return fmt.Sprintf("storage %d", int(s))
}

// Shape is what a layer's attention looks like.
type Shape struct {
	QueryHeads, KVHeads int // QueryHeads is a multiple of KVHeads; query head h reads KV head h / (QueryHeads/KVHeads)
	DimK, DimV          int // floats of a head's key and value
	Type                Storage
}

// Limits of a Shape and of a Cache.
const (
	MaxHeads = 1024
	MaxDim   = 1024
	MaxCells = 1 << 26
)

// Geometry of the store; kernel.h has the same numbers.
const (
	panelCells = 32
	pagePanels = 8
	pageCells  = panelCells * pagePanels
	lane       = 16 // floats: rows of values are padded to this, the longest vector
	q8Block    = 32
)

var (
	// ErrShape: a Shape, or a number of cells, that no cache can have.
	ErrShape = errors.New("attention shape out of range")
	// ErrCell: a cell index below zero or not below the cache's maximum.
	ErrCell = errors.New("cell outside the cache")
	// ErrLength: a slice that does not fit the shape, or two that overlap.
	ErrLength = errors.New("slice of the wrong length")
	// ErrMask: a mask whose size does not fit, or which holds NaN or +infinity.
	ErrMask = errors.New("unusable attention mask")
	// ErrParams: a parameter that is not finite or not usable.
	ErrParams = errors.New("unusable attention parameter")
	// ErrUnwritten: the mask lets a query see a cell that holds no key.
	ErrUnwritten = errors.New("mask shows a cell that was never written")
	// ErrNotFinite: a query, key, value or result is NaN or infinite, or a key or value too large for the storage.
	ErrNotFinite = errors.New("attention over a number that is not finite")
	// ErrClosed: the cache or pool was closed.
	ErrClosed = errors.New("attention cache or pool used after it was closed")
)

func (s Shape) validate() error {
	switch {
	case s.KVHeads < 1 || s.KVHeads > MaxHeads || s.QueryHeads < 1 || s.QueryHeads > MaxHeads || s.QueryHeads%s.KVHeads != 0:
		return fmt.Errorf("%w: %d query heads over %d KV heads: up to %d, the first a multiple of the second",
			ErrShape, s.QueryHeads, s.KVHeads, MaxHeads)
	case s.DimK < 1 || s.DimK > MaxDim || s.DimV < 1 || s.DimV > MaxDim:
		return fmt.Errorf("%w: head dimensions %d and %d: from 1 to %d", ErrShape, s.DimK, s.DimV, MaxDim)
	case s.Type < F16 || s.Type > Q8_0:
		return fmt.Errorf("%w: %v is none of f16, f32, q8_0", ErrShape, s.Type)
	}
	return nil
}

func (s Shape) group() int { return s.QueryHeads / s.KVHeads }

// paddedV is the length of a stored value row.
func (s Shape) paddedV() int { return roundUp(s.DimV, lane) }

// panelBytes returns the sizes of one KV head's panel of keys and of values. Keys lie [dimension][cell], values
// [cell][dimension, padded]; in Q8_0 the scales follow, [block][cell] and [cell][block].
func (s Shape) panelBytes() (k, v int) {
	k, v = s.DimK*panelCells, s.paddedV()*panelCells
	switch s.Type {
	case F16:
		return 2 * k, 2 * v
	case F32:
		return 4 * k, 4 * v
	}
	return k + 2*q8Blocks(s.DimK)*panelCells, v + 2*q8Blocks(s.DimV)*panelCells
}

// pageBytes is the size of a page: all heads' keys, then all heads' values, panel after panel within a head.
func (s Shape) pageBytes() int {
	k, v := s.panelBytes()
	return (k + v) * pagePanels * s.KVHeads
}

func q8Blocks(dim int) int { return (dim + q8Block - 1) / q8Block }

func roundUp(n, to int) int { return (n + to - 1) / to * to }

// Slopes returns the factor of the mask for each query head, as ggml derives it for ALiBi (arXiv 2108.12409) from the op's
// max_bias: 1 for every head if it is not above zero.
func Slopes(heads int, maxBias float32) []float32 {
	slopes := make([]float32, heads)
	log2 := 1
	if heads > 0 {
		log2 = 1 << (bits.Len(uint(heads)) - 1)
	}
	m0 := float32(math.Pow(2, float64(-maxBias/float32(log2))))
	m1 := float32(math.Pow(2, float64(-(maxBias/2)/float32(log2))))
	for h := range slopes {
		switch {
		case !(maxBias > 0):
			slopes[h] = 1
		case h < log2:
			slopes[h] = float32(math.Pow(float64(m0), float64(h+1)))
		default:
			slopes[h] = float32(math.Pow(float64(m1), float64(2*(h-log2)+1)))
		}
	}
	return slopes
}
