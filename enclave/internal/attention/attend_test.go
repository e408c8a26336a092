package attention

import (
	"errors"
	"fmt"
	"math"
	"testing"
)

// tolerance bounds what single precision may do to an output of values around 1. A dot product of d terms gathers errors like a
// random walk, so a logit is off by about u·√d (u = 2^-24), times the softmax weights' and the values' size of a few units;
// logits of up to about 30 add their own rounding.
func tolerance(s Shape) float64 {
	const u = 1.0 / (1 << 24)
	return u * (16*math.Sqrt(float64(s.DimK)) + 32)
}

// compare runs a layer on every kernel of this machine and compares with the reference over what the cache really holds.
func compare(t *testing.T, l *layer, typ MaskType, threads int) {
	t.Helper()
	pool := NewPool(threads)
	defer pool.Close()
	params := l.params
	params.Pool = pool
	var want []float64
	for _, k := range kernels() {
		c := l.cache(t, k)
		if want == nil {
			want = l.rounded(t, c).attend()
		}
		out := make([]float32, len(want))
		if err := Attend(out, l.q, c, l.bytes(typ, roundUp(l.cells, 64)), params); err != nil {
			t.Fatalf("%s: %v", k.name, err)
		}
		t.Logf("%s: off by at most %.2g", k.name, worst(t, out, want, tolerance(l.shape)))
	}
}

func TestHeads(t *testing.T) {
	for _, dim := range []int{64, 80, 96, 128, 256, 40, 72} {
		for _, heads := range [][2]int{{3, 3}, {8, 2}, {5, 1}, {14, 2}, {96, 1}} {
			for _, storage := range []Storage{F16, F32, Q8_0} {
				t.Run(fmt.Sprintf("%d/%d over %d/%v", dim, heads[0], heads[1], storage), func(t *testing.T) {
					l := newLayer(Shape{heads[0], heads[1], dim, dim, storage}, 3, 77, uint64(dim))
					l.causal(0)
					compare(t, l, MaskF16, 1)
				})
			}
		}
	}
}

func TestDimensionsThatDiffer(t *testing.T) {
	for _, dims := range [][2]int{{192, 128}, {72, 40}, {40, 72}, {1, 1}, {33, 31}, {576, 512}} {
		for _, storage := range []Storage{F16, F32, Q8_0} {
			t.Run(fmt.Sprintf("%d and %d/%v", dims[0], dims[1], storage), func(t *testing.T) {
				l := newLayer(Shape{4, 2, dims[0], dims[1], storage}, 2, 40, 9)
				l.causal(0)
				compare(t, l, MaskF16, 1)
			})
		}
	}
}

func TestBatches(t *testing.T) {
	for _, tokens := range []int{1, 2, 7, 64, 512} {
		for _, threads := range []int{1, 3} {
			t.Run(fmt.Sprintf("%d tokens/%d threads", tokens, threads), func(t *testing.T) {
				l := newLayer(Shape{4, 2, 64, 64, F16}, tokens, 600, 4)
				l.causal(0)
				compare(t, l, MaskF16, threads)
			})
		}
	}
}

func TestMasksAndParams(t *testing.T) {
	tests := []struct {
		name   string
		change func(l *layer)
		typ    MaskType
	}{
		{"no mask", func(l *layer) {}, NoMask},
		{"causal, f32", func(l *layer) { l.causal(0) }, MaskF32},
		{"window", func(l *layer) { l.causal(50) }, MaskF16},
		{"window of one", func(l *layer) { l.causal(1) }, MaskF16},
		{"sinks", func(l *layer) { l.causal(0); l.params.Sinks = []float32{-3, 0, 2, 9, -50, 60} }, MaskF16},
		{"sinks and window", func(l *layer) { l.causal(9); l.params.Sinks = []float32{-3, 0, 2, 9, -50, 60} }, MaskF16},
		{"softcap", func(l *layer) { l.causal(0); l.params.LogitSoftcap = 5 }, MaskF16},
		{"softcap, no mask", func(l *layer) { l.params.LogitSoftcap = 30 }, NoMask},
		{"softcap, far out", func(l *layer) { l.causal(0); l.params.LogitSoftcap = 0.1 }, MaskF16},
		{"alibi", func(l *layer) { l.causal(0); l.alibi(8) }, MaskF16},
		{"alibi, f32", func(l *layer) { l.causal(0); l.alibi(8) }, MaskF32},
		{"all at once", func(l *layer) {
			l.causal(100)
			l.alibi(4)
			l.params.LogitSoftcap, l.params.Sinks = 20, []float32{1, 2, 3, 4, 5, 6}
		}, MaskF16},
		{"no scale", func(l *layer) { l.causal(0); l.params.Scale = 0 }, MaskF16},
		{"negative scale", func(l *layer) { l.causal(0); l.params.Scale = -0.2 }, MaskF16},
	}
	for _, tt := range tests {
		for _, tokens := range []int{1, 30} {
			t.Run(fmt.Sprintf("%s/%d", tt.name, tokens), func(t *testing.T) {
				l := newLayer(Shape{6, 2, 64, 64, F16}, tokens, 301, 5)
				tt.change(l)
				compare(t, l, tt.typ, 1)
			})
		}
	}
}

// A unified cache holds the cells of several sequences, here in turns: a token sees those of its own.
func TestSequencesThatShareACache(t *testing.T) {
	l := newLayer(Shape{8, 2, 64, 64, F16}, 4, 400, 6)
	for token := range 4 {
		row := make([]float32, l.cells)
		for c := range row {
			if mine := c/7%4 == token; !mine {
				row[c] = float32(math.Inf(-1))
			}
		}
		l.mask = append(l.mask, row)
	}
	compare(t, l, MaskF16, 2)
}

// Two streams are two caches, whose cells have the same numbers.
func TestStreamsAreApart(t *testing.T) {
	for seed := range uint64(2) {
		l := newLayer(Shape{8, 2, 64, 64, F16}, 5, 100+40*int(seed), seed)
		l.causal(0)
		compare(t, l, MaskF16, 1)
	}
}

// Threads, and splits along the cells, only change the order of additions.
func TestThreads(t *testing.T) {
	for _, shape := range []Shape{{8, 1, 128, 128, F16}, {32, 8, 64, 64, Q8_0}, {2, 2, 80, 80, F32}} {
		for _, threads := range []int{1, 2, 5, 16} {
			t.Run(fmt.Sprintf("%v/%d", shape, threads), func(t *testing.T) {
				l := newLayer(shape, 1, 2100, 7)
				l.causal(1900)
				l.params.Sinks = make([]float32, shape.QueryHeads)
				compare(t, l, MaskF16, threads)
			})
		}
	}
}

// A row that sees nothing is zero, as in FLASH_ATTN_EXT, with sinks or without.
func TestARowThatSeesNothing(t *testing.T) {
	for _, sinks := range [][]float32{nil, {1, -80}} {
		for _, k := range kernels() {
			l := newLayer(Shape{2, 1, 64, 64, F16}, 2, 64, 8)
			l.causal(0)
			for c := range l.mask[1] {
				l.mask[1][c] = float32(math.Inf(-1))
			}
			l.params.Sinks = sinks
			out := normalOnes(2 * 2 * 64)
			if err := Attend(out, l.q, l.cache(t, k), l.bytes(MaskF16, 64), l.params); err != nil {
				t.Fatal(err)
			}
			for i, x := range out[2*64:] {
				if x != 0 {
					t.Fatalf("%s: float %d is %v, want 0", k.name, i, x)
				}
			}
			if out[0] == 0 || out[0] == 1 {
				t.Errorf("%s: the other row is %v", k.name, out[0])
			}
		}
	}
}

func normalOnes(n int) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = 1
	}
	return x
}

// Logits in the hundreds, positive or negative, neither overflow nor vanish.
func TestLargeLogits(t *testing.T) {
	for _, scale := range []float32{50, -50} {
		l := newLayer(Shape{2, 1, 64, 64, F32}, 3, 200, 10)
		l.causal(0)
		l.params.Scale = scale
		want := l.attend()
		for _, k := range kernels() {
			out := make([]float32, len(want))
			if err := Attend(out, l.q, l.cache(t, k), l.bytes(MaskF16, 200), l.params); err != nil {
				t.Fatal(err)
			}
			// A logit of about 1,000 has an error of about 1,000 · 2^-24 · √64, and so has its weight.
			worst(t, out, want, 5e-3)
		}
	}
}

// What a mask hides costs nothing, and may hold anything: here cells that were never written.
func TestHiddenCellsNeedNotExist(t *testing.T) {
	l := newLayer(Shape{4, 2, 64, 64, F16}, 6, 1000, 11)
	l.causal(40)
	for c := range 900 {
		l.k[c], l.v[c] = nil, nil
	}
	compare(t, l, MaskF16, 1)

	c := l.cache(t, best())
	l.mask[3][899] = 0
	out := make([]float32, 6*4*64)
	err := Attend(out, l.q, c, l.bytes(MaskF16, 1024), l.params)
	if !errors.Is(err, ErrUnwritten) || err.Error() != "mask shows a cell that was never written: 899" {
		t.Errorf("error %v, want ErrUnwritten with the cell", err)
	}
}

// What rounding in the cache costs. F16: half a unit of 2^-11 relative, in logits and values. Q8_0: values up to 3 in steps of
// 3/127, half of which is 0.012 for a value and, over 64 random terms times 1.5/√64, about 0.03 for a logit.
func TestStorageRounding(t *testing.T) {
	for storage, most := range map[Storage]float64{F32: 1e-5, F16: 3e-3, Q8_0: 6e-2} {
		l := newLayer(Shape{8, 2, 64, 64, storage}, 16, 300, 12)
		l.causal(0)
		want := l.attend()
		out := make([]float32, len(want))
		if err := Attend(out, l.q, l.cache(t, best()), l.bytes(MaskF16, 300), l.params); err != nil {
			t.Fatal(err)
		}
		off := worst(t, out, want, most)
		t.Logf("%v: off by at most %.2g", storage, off)
		if storage != F32 && off < most/100 {
			t.Errorf("%v: off by %.2g only: was it rounded at all?", storage, off)
		}
	}
}
