package shield

import "github.com/kvshield/kvshield/enclave"

const (
	// maxRow keeps the index of a float within a row in 16 bits: four times the largest llama.
	maxRow   = 1 << 16
	maxHeads = 1 << 12
	// maxLayers bounds what is counted layer by layer.
	maxLayers = 1 << 16
	// maxTable bounds the inverse tables of a model, which live in memory that is never swapped.
	maxTable = 32 << 20
)

// Shape is the geometry of a model's attention.
type Shape struct {
	Layers   int
	Heads    int // query heads, in the layer that has most
	HeadsKV  int // key/value heads, in the layer that has most
	KeyDim   int // head dimension of queries and keys
	ValueDim int // head dimension of values
	RotDim   int // rows of a query or key head that are rotated; 0 without a rotary embedding
	Rope     Rope
	Base     float32 // of the rotary frequencies
	// FixedHeads keeps heads in their places: where every head has a bias of its own (ALiBi).
	FixedHeads bool
	// PerLayer is for models whose layers differ; nil where all are the same.
	PerLayer []Counts
}

// Counts are numbers of query heads and of key/value heads.
type Counts struct{ Heads, KV int }

// In says how many heads a layer has.
func (s Shape) In(layer int) Counts {
	if s.PerLayer != nil {
		return s.PerLayer[layer]
	}
	return Counts{s.Heads, s.HeadsKV}
}

// RowFloats is the length of a row of a layer's attention output, in the layer that has most heads.
func (s Shape) RowFloats() int { return s.Heads * s.ValueDim }

// RowOf is the length of a row of a layer's attention output.
func (s Shape) RowOf(layer int) int { return s.In(layer).Heads * s.ValueDim }

// HeadRows says how many heads the tensor of a role has in a layer, and rows in each.
func (s Shape) HeadRows(r Role, layer int) (heads, rows int) {
	n := s.In(layer)
	switch r {
	case Query:
		return n.Heads, s.KeyDim
	case Key:
		return n.KV, s.KeyDim
	case HeadNorm:
		return 1, s.KeyDim
	case Sink, HeadGate:
		return n.Heads, 1
	case Gate:
		return n.Heads, s.ValueDim
	}
	return n.KV, s.ValueDim
}

func (s Shape) check() error {
	switch {
	case s.Layers < 1 || s.Heads < 1 || s.KeyDim < 1 || s.ValueDim < 1:
		return enclave.Invalid("the model has %d layers, %d query heads and head dimensions %d and %d, all of which must be above zero",
			s.Layers, s.Heads, s.KeyDim, s.ValueDim)
	case s.HeadsKV < 1:
		return enclave.Refuse("the model has layers without key/value heads, which mode permute does not support")
	case s.RotDim < 0 || s.RotDim%2 != 0 || s.RotDim > s.KeyDim || (s.RotDim == 0) != (s.Rope == RopeNone):
		return enclave.Invalid("a rotary embedding over %d of %d rows is not possible", s.RotDim, s.KeyDim)
	case s.Rope != RopeNone && !(s.Base > 0 && usable(s.Base)):
		return enclave.Invalid("a rotary embedding with base %g is not possible", s.Base)
	}
	if err := s.checkSize(); err != nil {
		return err
	}
	for layer := range s.Layers {
		switch n := s.In(layer); {
		case n.Heads < 1 || n.KV < 1:
			return enclave.Refuse("layer %d has %d query heads and %d key/value heads; layers without attention are not supported by mode permute", layer, n.Heads, n.KV)
		case n.Heads%n.KV != 0:
			return enclave.Invalid("%d query heads are no multiple of %d key/value heads", n.Heads, n.KV)
		}
	}
	return nil
}

func (s Shape) checkSize() error {
	if s.Heads > maxHeads || s.KeyDim > maxRow || s.ValueDim > maxRow || s.RowFloats() > maxRow {
		return enclave.Refuse("attention with %d heads of dimension %d is larger than mode permute supports (%d heads, %d floats in a row)",
			s.Heads, max(s.KeyDim, s.ValueDim), maxHeads, maxRow)
	}
	if s.Layers > maxTable/2/s.RowFloats() {
		return enclave.Refuse("%d layers with %d floats in a row are more than mode permute supports (tables of %d bytes)",
			s.Layers, s.RowFloats(), maxTable)
	}
	return nil
}
