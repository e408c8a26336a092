package attention

import (
	"bytes"
	"errors"
	"math"
	"testing"

	"github.com/kvshield/kvshield/enclave/internal/secmem"
)

var small = Shape{QueryHeads: 4, KVHeads: 2, DimK: 40, DimV: 24, Type: F16}

func TestPutAndGet(t *testing.T) {
	for _, k := range kernels() {
		for storage, most := range map[Storage]float64{F32: 0, F16: 4.0 / 2048, Q8_0: 5.0 / 254} {
			s := small
			s.Type = storage
			l := newLayer(s, 1, 520, 1)
			r := l.rounded(t, l.cache(t, k))
			for c := range l.k {
				worst(t, r.k[c], doubles(l.k[c]), most)
				worst(t, r.v[c], doubles(l.v[c]), most)
			}
		}
	}
}

func doubles(x []float32) []float64 {
	d := make([]float64, len(x))
	for i, f := range x {
		d[i] = float64(f)
	}
	return d
}

// All kernels write the same bytes, so that they can be compared, and rounding is the same on every machine. The numbers are those
// where rounding to F16 goes wrong first: ties, subnormals, the largest.
func TestKernelsStoreTheSameBytes(t *testing.T) {
	awkward := []float32{0, float32(math.Copysign(0, -1)), 1, 1 + 1.0/2048, 1 + 3.0/2048, 65504, -65519, 6e-8, 2.9e-8, 2.98e-8, 3e-8, 1e-30,
		6.1e-5, 6.097e-5, 0.5, -0.25, 1.0 / 3, 127, 126.5, -126.5, 1e-45}
	for _, storage := range []Storage{F16, F32, Q8_0} {
		s := Shape{QueryHeads: 2, KVHeads: 2, DimK: 72, DimV: 33, Type: storage}
		var want []byte
		for _, k := range kernels() {
			c, err := newCache(s, 256, k)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(c.Close)
			l := newLayer(s, 1, 256, 2)
			for cell := range l.k {
				key, value := l.k[cell], l.v[cell]
				for i := range 20 {
					key[(cell+3*i)%len(key)] = awkward[(cell+i)%len(awkward)]
					value[(cell+3*i)%len(value)] = awkward[(cell+i)%len(awkward)]
				}
				if err := c.Put(int64(cell), key, value); err != nil {
					t.Fatal(err)
				}
			}
			if want == nil {
				want = c.pages[0].mem
			}
			if !bytes.Equal(c.pages[0].mem, want) {
				t.Errorf("%v: %s writes other bytes than %s", storage, k.name, kernels()[0].name)
			}
		}
	}
}

func TestHalves(t *testing.T) {
	for h := range 1 << 16 {
		f := halfFloat(uint16(h))
		if f != f {
			if halfFinite(uint16(h)) {
				t.Fatalf("%#x became NaN", h)
			}
			continue
		}
		if back := halfBits(f); back != uint16(h) {
			t.Fatalf("%#x became %v and %#x", h, f, back)
		}
	}
	for f, want := range map[float32]uint16{65519: 0x7bff, 65520: 0x7c00, 1e30: 0x7c00, -1e30: 0xfc00, 1 + 1.0/2048: 0x3c00, 1 + 3.0/2048: 0x3c02} {
		if got := halfBits(f); got != want {
			t.Errorf("%v became %#x, want %#x", f, got, want)
		}
	}
}

func TestPutRejects(t *testing.T) {
	inf, nan := float32(math.Inf(1)), float32(math.NaN())
	tests := []struct {
		name    string
		storage Storage
		cell    int64
		k, v    int
		bad     float32
		want    error
	}{
		{"negative cell", F16, -1, 80, 48, 0, ErrCell},
		{"least cell", F16, math.MinInt64, 80, 48, 0, ErrCell},
		{"cell past the end", F16, 300, 80, 48, 0, ErrCell},
		{"greatest cell", F16, math.MaxInt64, 80, 48, 0, ErrCell},
		{"short key", F16, 0, 79, 48, 0, ErrLength},
		{"long value", F16, 0, 80, 49, 0, ErrLength},
		{"nothing", F16, 0, 0, 0, 0, ErrLength},
		{"NaN as f16", F16, 7, 80, 48, nan, ErrNotFinite},
		{"NaN as f32", F32, 7, 80, 48, nan, ErrNotFinite},
		{"NaN as q8_0", Q8_0, 7, 80, 48, nan, ErrNotFinite},
		{"infinity as f16", F16, 7, 80, 48, inf, ErrNotFinite},
		{"infinity as f32", F32, 7, 80, 48, -inf, ErrNotFinite},
		{"infinity as q8_0", Q8_0, 7, 80, 48, inf, ErrNotFinite},
		{"too large for f16", F16, 7, 80, 48, 65520, ErrNotFinite},
		{"large as f32", F32, 7, 80, 48, 3e38, nil},
		{"too large for q8_0's scale", Q8_0, 7, 80, 48, 1e7, ErrNotFinite},
		{"last cell", F16, 299, 80, 48, 1, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, k := range kernels() {
				testPut(t, k, tt.storage, tt.cell, tt.k, tt.v, tt.bad, tt.want)
			}
		})
	}
}

// testPut puts the number among the keys, then among the values, over a cell that was good before.
func testPut(t *testing.T, kern *kernel, storage Storage, cell int64, nk, nv int, bad float32, want error) {
	s := small
	s.Type = storage
	c, err := newCache(s, 300, kern)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for place := range 2 {
		good := cell == 7 || cell == 299
		if good {
			if err := c.Put(cell, normalOnes(nk), normalOnes(nv)); err != nil {
				t.Fatal(err)
			}
		}
		k, v := make([]float32, nk), make([]float32, nv)
		if nk > 0 {
			[][]float32{k, v}[place][nv-1] = bad
		}
		if err := c.Put(cell, k, v); !errors.Is(err, want) {
			t.Fatalf("%s: error %v, want %v", kern.name, err, want)
		}
		if !good || want == nil {
			continue
		}
		if err := c.Get(cell, k, v); !errors.Is(err, ErrUnwritten) {
			t.Errorf("%s: after a failed Put the cell reads as %v, want ErrUnwritten", kern.name, err)
		}
		left := c.pages[0].mem
		if zeros := make([]byte, len(left)); !bytes.Equal(left, zeros) {
			t.Errorf("%s: a failed Put left something in the page", kern.name)
		}
	}
}

func TestShapesRejected(t *testing.T) {
	good := Shape{4, 2, 64, 64, F16}
	for name, change := range map[string]func(*Shape) int{
		"no heads":         func(s *Shape) int { s.QueryHeads = 0; return 1 },
		"no KV heads":      func(s *Shape) int { s.KVHeads = 0; return 1 },
		"negative heads":   func(s *Shape) int { s.QueryHeads, s.KVHeads = -4, -2; return 1 },
		"no whole group":   func(s *Shape) int { s.KVHeads = 3; return 1 },
		"too many heads":   func(s *Shape) int { s.QueryHeads = 2048; return 1 },
		"no key dimension": func(s *Shape) int { s.DimK = 0; return 1 },
		"huge dimension":   func(s *Shape) int { s.DimV = 1 << 40; return 1 },
		"unknown storage":  func(s *Shape) int { s.Type = 3; return 1 },
		"negative storage": func(s *Shape) int { s.Type = -1; return 1 },
		"no cells":         func(s *Shape) int { return 0 },
		"negative cells":   func(s *Shape) int { return -1 },
		"too many cells":   func(s *Shape) int { return MaxCells + 1 },
		"page above a GiB": func(s *Shape) int { *s = Shape{1024, 1024, 1024, 1024, F32}; return 1 },
	} {
		s := good
		cells := change(&s)
		if c, err := NewCache(s, cells); !errors.Is(err, ErrShape) || c != nil {
			t.Errorf("%s: %v, error %v, want ErrShape", name, c, err)
		}
	}
}

func TestMemoryGrowsByPagesAndIsGivenBack(t *testing.T) {
	c, err := NewCache(small, 2000)
	if err != nil {
		t.Fatal(err)
	}
	k, v := make([]float32, 80), make([]float32, 48)
	page := int64(small.pageBytes())
	steps := []struct {
		cell  int64
		pages int64
	}{{0, 1}, {255, 1}, {1999, 2}, {256, 3}, {0, 3}}
	for _, step := range steps {
		if err := c.Put(step.cell, k, v); err != nil {
			t.Fatal(err)
		}
		if got := c.Bytes(); got != step.pages*page {
			t.Errorf("after cell %d: %d bytes, want %d", step.cell, got, step.pages*page)
		}
	}
	var kept int64
	for kind, n := range c.Kinds() {
		if kind != secmem.Secret && kind != secmem.Locked && kind != secmem.Plain {
			t.Errorf("kind %q", kind)
		}
		kept += n
	}
	if kept != c.Bytes() {
		t.Errorf("kinds add up to %d bytes, want %d", kept, c.Bytes())
	}
	c.Clear()
	if c.Bytes() != 0 {
		t.Errorf("%d bytes after Clear", c.Bytes())
	}
	if err := c.Get(0, k, v); !errors.Is(err, ErrUnwritten) {
		t.Errorf("after Clear: error %v, want ErrUnwritten", err)
	}
	if err := c.Put(3, k, v); err != nil {
		t.Errorf("after Clear: %v", err)
	}
	c.Close()
	c.Close()
	if err := c.Put(3, k, v); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: error %v, want ErrClosed", err)
	}
	if err := c.Get(3, k, v); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: error %v, want ErrClosed", err)
	}
}

// A page of F16 holds as many bytes as ggml's cache would, one of Q8_0 about half.
func TestStorageSizes(t *testing.T) {
	want := map[Storage]int{F16: 2 * 2 * 64 * 8 * 256, F32: 4 * 2 * 64 * 8 * 256, Q8_0: 34 * 2 * 2 * 8 * 256}
	for storage, bytes := range want {
		s := Shape{32, 8, 64, 64, storage}
		if got := s.pageBytes(); got != bytes {
			t.Errorf("%v: %d bytes a page, want %d", storage, got, bytes)
		}
	}
}
