package attention

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"
)

// layer is what a test attends over: the queries, keys and values as given, before any rounding.
type layer struct {
	shape  Shape
	tokens int
	cells  int
	q      []float32
	k, v   [][]float32 // by cell; nil for a cell that was never written
	mask   [][]float32 // by token; nil for no mask
	params Params
}

// newLayer draws a layer whose logits spread over a few units, as a model's do. Mask and params are left to the test.
func newLayer(s Shape, tokens, cells int, seed uint64) *layer {
	rnd := rand.New(rand.NewPCG(seed, 1))
	l := &layer{shape: s, tokens: tokens, cells: cells}
	l.q = normal(rnd, tokens*s.QueryHeads*s.DimK)
	for range cells {
		l.k = append(l.k, normal(rnd, s.KVHeads*s.DimK))
		l.v = append(l.v, normal(rnd, s.KVHeads*s.DimV))
	}
	l.params.Scale = float32(1.5 / math.Sqrt(float64(s.DimK)))
	return l
}

func normal(rnd *rand.Rand, n int) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(rnd.NormFloat64())
	}
	return x
}

// causal lets the tokens be the last ones of the cells; a window above zero hides all but so many.
func (l *layer) causal(window int) {
	hidden := float32(math.Inf(-1))
	for t := range l.tokens {
		row := make([]float32, l.cells)
		last := l.cells - l.tokens + t
		for c := range row {
			if c > last || window > 0 && c <= last-window {
				row[c] = hidden
			}
		}
		l.mask = append(l.mask, row)
	}
}

// alibi replaces the zeros of the mask by the distance to the token, as llama.cpp does.
func (l *layer) alibi(maxBias float32) {
	l.params.MaxBias = maxBias
	for t, row := range l.mask {
		for c := range row {
			if row[c] == 0 {
				row[c] = -float32(l.cells - l.tokens + t - c)
			}
		}
	}
}

// bytes encodes the mask with rows of `cells` elements: what lies past the layer's own cells is hidden.
func (l *layer) bytes(typ MaskType, cells int) Mask {
	if l.mask == nil {
		return Mask{Type: NoMask, Cells: l.cells}
	}
	m := Mask{Type: typ, Cells: cells, Rows: l.tokens}
	for _, row := range l.mask {
		for c := range cells {
			f := float32(math.Inf(-1))
			if c < len(row) {
				f = row[c]
			}
			if typ == MaskF16 {
				m.Data = binary.LittleEndian.AppendUint16(m.Data, halfBits(f))
			} else {
				m.Data = binary.LittleEndian.AppendUint32(m.Data, math.Float32bits(f))
			}
		}
	}
	return m
}

// cache stores the layer's cells.
func (l *layer) cache(t testing.TB, k *kernel) *Cache {
	t.Helper()
	c, err := newCache(l.shape, l.cells, k)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	for cell := range l.cells {
		if l.k[cell] == nil {
			continue
		}
		if err := c.Put(int64(cell), l.k[cell], l.v[cell]); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// rounded returns the layer as the cache holds it, so that what is left of an error is the kernel's.
func (l *layer) rounded(t testing.TB, c *Cache) *layer {
	t.Helper()
	r := *l
	r.k, r.v = nil, nil
	for cell := range l.cells {
		if l.k[cell] == nil {
			r.k, r.v = append(r.k, nil), append(r.v, nil)
			continue
		}
		k, v := make([]float32, len(l.k[cell])), make([]float32, len(l.v[cell]))
		if err := c.Get(int64(cell), k, v); err != nil {
			t.Fatal(err)
		}
		r.k, r.v = append(r.k, k), append(r.v, v)
	}
	return &r
}

// attend is the reference: every step in double precision, one query at a time, straight from the definition.
func (l *layer) attend() []float64 {
	s := l.shape
	out := make([]float64, 0, l.tokens*s.QueryHeads*s.DimV)
	for t := range l.tokens {
		for h := range s.QueryHeads {
			out = append(out, l.row(t, h)...)
		}
	}
	return out
}

func (l *layer) row(t, h int) []float64 {
	s := l.shape
	kv := h / (s.QueryHeads / s.KVHeads)
	q := l.q[(t*s.QueryHeads+h)*s.DimK:][:s.DimK]
	logits := make([]float64, l.cells)
	top := math.Inf(-1)
	for c := range logits {
		logits[c] = math.Inf(-1)
		if l.k[c] != nil && (l.mask == nil || !math.IsInf(float64(l.mask[t][c]), -1)) {
			logits[c] = l.logit(t, h, c, q, l.k[c][kv*s.DimK:][:s.DimK])
		}
		top = math.Max(top, logits[c])
	}
	sum := 0.0
	if l.params.Sinks != nil {
		top = math.Max(top, float64(l.params.Sinks[h]))
		sum = math.Exp(float64(l.params.Sinks[h]) - top)
	}
	out := make([]float64, s.DimV)
	if math.IsInf(top, -1) {
		return out
	}
	for c, x := range logits {
		if math.IsInf(x, -1) {
			continue
		}
		w := math.Exp(x - top)
		sum += w
		for d := range out {
			out[d] += w * float64(l.v[c][kv*s.DimV+d])
		}
	}
	for d := range out {
		out[d] /= sum
	}
	return out
}

func (l *layer) logit(t, h, c int, q, k []float32) float64 {
	dot := 0.0
	for d := range q {
		dot += float64(q[d]) * float64(k[d])
	}
	x := dot * float64(l.params.Scale)
	if l.params.LogitSoftcap != 0 {
		x = float64(l.params.LogitSoftcap) * math.Tanh(x/float64(l.params.LogitSoftcap))
	}
	if l.mask != nil {
		x += slope(h, l.shape.QueryHeads, float64(l.params.MaxBias)) * float64(l.mask[t][c])
	}
	return x
}

// slope follows the ALiBi paper's construction for a number of heads that is no power of two.
func slope(h, heads int, maxBias float64) float64 {
	if maxBias <= 0 {
		return 1
	}
	power := math.Exp2(math.Floor(math.Log2(float64(heads))))
	if float64(h) < power {
		return math.Exp2(-maxBias / power * float64(h+1))
	}
	return math.Exp2(-maxBias / 2 / power * float64(2*(h-int(power))+1))
}

// worst returns the largest difference, and fails where it is above the tolerance.
func worst(t testing.TB, got []float32, want []float64, tolerance float64) float64 {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d floats, want %d", len(got), len(want))
	}
	most := 0.0
	for i := range got {
		diff := math.Abs(float64(got[i]) - want[i])
		if !(diff <= tolerance) {
			t.Fatalf("float %d is %v, want %v: off by %.3g, more than %.3g", i, got[i], want[i], diff, tolerance)
		}
		most = max(most, diff)
	}
	return most
}
