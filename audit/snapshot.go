package audit

import "fmt"

// Matrix holds Rows × Cols numbers, row after row.
type Matrix struct {
	Rows, Cols int
	Data       []float32
}

// NewMatrix is a matrix of zeros.
func NewMatrix(rows, cols int) Matrix { return Matrix{rows, cols, make([]float32, rows*cols)} }

// Row i, not a copy.
func (m Matrix) Row(i int) []float32 { return m.Data[i*m.Cols : (i+1)*m.Cols : (i+1)*m.Cols] }

// Head returns the part of row i that belongs to head h of the given dimension.
func (m Matrix) Head(i, h, dim int) []float32 { return m.Row(i)[h*dim : (h+1)*dim] }

// First is the matrix of the first n rows, sharing their memory.
func (m Matrix) First(n int) Matrix { return Matrix{n, m.Cols, m.Data[:n*m.Cols]} }

// Layer is what a cache holds for one layer: a row for each cached token, in the order of their positions, all
// key/value heads of a token side by side. Keys are as the engine caches them, after the rotary embedding.
type Layer struct{ K, V Matrix }

// Source says where a snapshot was taken.
type Source string

const (
	SlotFile  Source = "slot file"      // what POST /slots/N?action=save wrote
	LiveCache Source = "live cache"     // the engine's own cache tensors, on whatever device they lie
	Compute   Source = "compute buffer" // the engine's activations, as the last graph left them
	Memory    Source = "process memory" // all memory of the engine's process
)

// Snapshot is a KV cache as an attacker finds it. It holds nothing that the attacker would not have: no token and no key.
type Snapshot struct {
	Source    Source
	Type      string // of the cache's elements: F16, F32, Q8_0
	HeadsKV   int
	Layers    []Layer
	Positions []int32 // of the rows, counted from 0; nil: 0, 1, 2, …
}

// Tokens is the number of cached tokens.
func (s *Snapshot) Tokens() int {
	if len(s.Layers) == 0 {
		return 0
	}
	return s.Layers[0].V.Rows
}

// First is the snapshot as it was when it held n tokens.
func (s *Snapshot) First(n int) *Snapshot {
	c := *s
	c.Layers = make([]Layer, len(s.Layers))
	for i, l := range s.Layers {
		c.Layers[i] = Layer{l.K.First(n), l.V.First(n)}
	}
	if s.Positions != nil {
		c.Positions = s.Positions[:n]
	}
	return &c
}

// Position of row i.
func (s *Snapshot) Position(i int) int {
	if s.Positions == nil {
		return i
	}
	return int(s.Positions[i])
}

// Check that all layers have a row for every token and heads of one size.
func (s *Snapshot) Check() error {
	for i, l := range s.Layers {
		for _, m := range []Matrix{l.K, l.V} {
			switch {
			case m.Rows != s.Tokens():
				return fmt.Errorf("layer %d of the snapshot has %d rows for %d tokens", i, m.Rows, s.Tokens())
			case len(m.Data) != m.Rows*m.Cols || s.HeadsKV < 1 || m.Cols%s.HeadsKV != 0:
				return fmt.Errorf("layer %d of the snapshot has %d numbers for %d rows of %d heads", i, len(m.Data), m.Rows, s.HeadsKV)
			}
		}
	}
	if s.Positions != nil && len(s.Positions) != s.Tokens() {
		return fmt.Errorf("%d positions for %d tokens", len(s.Positions), s.Tokens())
	}
	return nil
}
