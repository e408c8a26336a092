package resident

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"testing"

	"github.com/kvshield/kvshield/enclave"
)

// read returns the keys or values that a scene's store holds in a cell, through the caches themselves.
func (s *scene) read(cell int64) (k, v []float32) {
	s.t.Helper()
	l := s.store.(*store).layers[s.id]
	c, place, err := l.find(cell)
	if err != nil {
		s.t.Fatal(err)
	}
	k, v = make([]float32, s.layer.KVHeads*s.layer.DimK), make([]float32, s.layer.KVHeads*s.layer.DimV)
	if err := c.Get(place, k, v); err != nil {
		s.t.Fatal(err)
	}
	return k, v
}

// rotated is the rotary embedding in double precision, from the papers (arXiv 2104.09864, 2309.00071).
func rotated(key []float32, shift int32, r *enclave.Rotation) []float64 {
	out := make([]float64, len(key))
	for i, x := range key {
		out[i] = float64(x)
	}
	d := float64(r.Dims)
	pairOf := func(turns float32) float64 {
		return d * math.Log(float64(r.ContextOrig)/(float64(turns)*2*math.Pi)) / (2 * math.Log(float64(r.Base)))
	}
	low, high := math.Max(0, math.Floor(pairOf(r.BetaFast))), math.Min(d-1, math.Ceil(pairOf(r.BetaSlow)))
	magnitude := float64(r.AttnFactor)
	if r.ExtFactor != 0 {
		magnitude *= 1 + 0.1*math.Log(1/float64(r.Scale))
	}
	for pair := range r.Dims / 2 {
		theta := float64(shift) * math.Pow(float64(r.Base), -2*float64(pair)/d)
		if r.Factors != nil {
			theta /= float64(r.Factors[pair])
		}
		angle := theta * float64(r.Scale)
		if r.ExtFactor != 0 {
			ramp := 1 - math.Min(1, math.Max(0, (float64(pair)-low)/math.Max(0.001, high-low)))
			mix := ramp * float64(r.ExtFactor)
			angle = angle*(1-mix) + theta*mix
		}
		i, j := 2*pair, 2*pair+1
		if r.Mode == modeNeox {
			i, j = pair, pair+r.Dims/2
		}
		x, y := out[i], out[j]
		out[i] = (x*math.Cos(angle) - y*math.Sin(angle)) * magnitude
		out[j] = (x*math.Sin(angle) + y*math.Cos(angle)) * magnitude
	}
	return out
}

var plainRope = enclave.Rotation{Dims: 32, Base: 10000, Scale: 1, AttnFactor: 1, ContextOrig: 4096, BetaFast: 32, BetaSlow: 1}

func rotations() map[string]enclave.Rotation {
	tests := map[string]enclave.Rotation{"norm": plainRope}
	add := func(name string, change func(r *enclave.Rotation)) {
		r := plainRope
		change(&r)
		tests[name] = r
	}
	add("neox", func(r *enclave.Rotation) { r.Mode = modeNeox })
	add("fewer rows", func(r *enclave.Rotation) { r.Dims = 20 })
	add("other base and scale", func(r *enclave.Rotation) { r.Base, r.Scale = 500000, 0.25 })
	add("yarn", func(r *enclave.Rotation) {
		r.ExtFactor, r.Scale, r.AttnFactor, r.Mode, r.ContextOrig, r.Base = 1, 0.25, 0.9, modeNeox, 2048, 1e6
	})
	add("the last rows", func(r *enclave.Rotation) { r.From, r.Dims = 6, 8 })
	add("factors", func(r *enclave.Rotation) {
		for i := range 16 {
			r.Factors = append(r.Factors, 1+float32(i)/4)
		}
	})
	return tests
}

func TestRotateAgainstReference(t *testing.T) {
	tolerance := map[enclave.Storage]float64{enclave.StorageF32: 3e-6, enclave.StorageF16: 2.5e-3, enclave.StorageQ8_0: 2e-2}
	for name, r := range rotations() {
		for storage, most := range tolerance {
			t.Run(fmt.Sprintf("%s/storage %d", name, storage), func(t *testing.T) {
				layer := demo
				layer.Storage = storage
				s := newScene(t, layer, 11)
				s.play(s.fill(20, enclave.MaskF16, 0), 0, 1, 1)
				r.First = 290 // the end of one stream and the beginning of the next
				r.Shift = make([]int32, 30)
				for i := range r.Shift {
					r.Shift[i] = []int32{-7, 0, -7, 300}[i%4]
				}
				if err := s.store.Rotate(s.id, &r); err != nil {
					t.Fatal(err)
				}
				s.compareKeys(&r, most)
			})
		}
	}
}

// compareKeys compares every written cell's key with its rotation, and its value with what was put.
func (s *scene) compareKeys(r *enclave.Rotation, most float64) {
	s.t.Helper()
	for cell, put := range s.k {
		shift, turned := int32(0), false
		if at := cell - int64(r.First); at >= 0 && at < int64(len(r.Shift)) {
			shift, turned = r.Shift[at], true
		}
		k, v := s.read(cell)
		for h := range s.layer.KVHeads {
			key := put[h*s.layer.DimK:][:s.layer.DimK]
			want := doubles(key)
			if turned { // by 0 too: YaRN scales
				want = append(want[:r.From], rotated(key[r.From:], shift, r)...)
			}
			for d, x := range want {
				if y := float64(k[h*s.layer.DimK+d]); !(math.Abs(x-y) <= most+math.Abs(float64(shift))*2e-7) { // angles are in single precision
					s.t.Fatalf("cell %d, shift %d, head %d, dimension %d: %v, want %v", cell, shift, h, d, y, x)
				}
			}
		}
		if fmt.Sprint(v) != fmt.Sprint(s.v[cell]) {
			s.t.Fatalf("cell %d: the value has changed", cell)
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

// With a Hadamard matrix the rotation happens in the basis before it.
func TestRotateUnderHadamard(t *testing.T) {
	layer := demo
	layer.Storage, layer.DimK = enclave.StorageF32, 32
	for _, n := range []int{1, 2, 16, 32} {
		s := newScene(t, layer, 12)
		s.play(s.fill(4, enclave.MaskF16, 0), 0, 1, 1)
		r := plainRope
		r.Hadamard, r.Shift = n, []int32{5, 5, -3, 5}
		if err := s.store.Rotate(s.id, &r); err != nil {
			t.Fatal(err)
		}
		for cell := range int64(4) {
			k, _ := s.read(cell)
			for h := range layer.KVHeads {
				base := walsh(doubles(s.k[cell][h*32:][:32]), n)
				turned := make([]float32, 32)
				for d, x := range base {
					turned[d] = float32(x)
				}
				want := walsh(rotated(turned, r.Shift[cell], &r), n)
				for d, x := range want {
					if math.Abs(x-float64(k[h*32+d])) > 4e-6 {
						t.Fatalf("size %d, cell %d, dimension %d: %v, want %v", n, cell, d, k[h*32+d], x)
					}
				}
			}
		}
	}
}

// walsh multiplies with the matrix whose element (i, j) is the parity of i AND j.
func walsh(x []float64, n int) []float64 {
	out := make([]float64, len(x))
	for i := range x {
		for j := range n {
			sign := 1.0
			for both := i % n & j; both != 0; both &= both - 1 {
				sign = -sign
			}
			out[i] += sign * x[i/n*n+j] / math.Sqrt(float64(n))
		}
	}
	return out
}

func TestRotateThereAndBack(t *testing.T) {
	layer := demo
	layer.Storage = enclave.StorageF32
	s := newScene(t, layer, 13)
	s.play(s.fill(6, enclave.MaskF16, 0), 0, 1, 1)
	for _, shift := range []int32{-123, 123} {
		r := plainRope
		r.Shift = []int32{shift, shift, 0, shift, shift, shift, shift, 5} // the last cells were never written
		if err := s.store.Rotate(s.id, &r); err != nil {
			t.Fatal(err)
		}
	}
	s.compareKeys(&enclave.Rotation{}, 2e-6)
}

func TestRotateRejects(t *testing.T) {
	inf, nan := float32(math.Inf(1)), float32(math.NaN())
	changes := map[string]func(r *enclave.Rotation){
		"mode 8":               func(r *enclave.Rotation) { r.Mode = 8 },
		"mode 24":              func(r *enclave.Rotation) { r.Mode = 24 },
		"mode 40":              func(r *enclave.Rotation) { r.Mode = 40 },
		"negative mode":        func(r *enclave.Rotation) { r.Mode = -1 },
		"odd rows":             func(r *enclave.Rotation) { r.Dims = 31 },
		"no rows":              func(r *enclave.Rotation) { r.Dims = 0 },
		"negative rows":        func(r *enclave.Rotation) { r.Dims = -2 },
		"rows past the head":   func(r *enclave.Rotation) { r.Dims = 42 },
		"short factors":        func(r *enclave.Rotation) { r.Factors = make([]float32, 15) },
		"zero factors":         func(r *enclave.Rotation) { r.Factors = make([]float32, 16) },
		"NaN base":             func(r *enclave.Rotation) { r.Base = nan },
		"negative base":        func(r *enclave.Rotation) { r.Base = -3 },
		"infinite scale":       func(r *enclave.Rotation) { r.Scale = inf },
		"infinite factor":      func(r *enclave.Rotation) { r.AttnFactor = inf },
		"yarn without context": func(r *enclave.Rotation) { r.ExtFactor, r.ContextOrig = 1, -5 },
		"Hadamard of 3":        func(r *enclave.Rotation) { r.Hadamard = 3 },
		"Hadamard past head":   func(r *enclave.Rotation) { r.Hadamard = 64 },
		"negative Hadamard":    func(r *enclave.Rotation) { r.Hadamard = math.MinInt },
		"negative cell":        func(r *enclave.Rotation) { r.First = -1 },
		"cells past the end":   func(r *enclave.Rotation) { r.First = 899 },
		"greatest cell":        func(r *enclave.Rotation) { r.First = math.MaxInt },
	}
	s := newScene(t, demo, 14)
	s.play(s.fill(4, enclave.MaskF16, 0), 0, 1, 1)
	for name, change := range changes {
		r := plainRope
		r.Shift = []int32{1, 1}
		change(&r)
		if err := s.store.Rotate(s.id, &r); !errors.Is(err, enclave.ErrCache) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.store.Rotate(s.id, nil); !errors.Is(err, enclave.ErrCache) {
		t.Errorf("nil: %v", err)
	}
	s.compareKeys(&enclave.Rotation{}, 0)
}

// A key that grows out of its storage is an error, and its cell is gone rather than wrong.
func TestRotateOutOfRange(t *testing.T) {
	s := newScene(t, demo, 15)
	s.play(s.fill(2, enclave.MaskF16, 0), 0, 1, 1)
	r := plainRope
	r.Shift, r.AttnFactor = []int32{1}, 1e6
	if err := s.store.Rotate(s.id, &r); err == nil {
		t.Error("no error")
	}
	if s.store.(*store).layers[s.id].streams[0].Written(0) {
		t.Error("the cell is still there")
	}
}

// testdata/rope-f16.bin is what ggml 0.27 itself makes (ggml_rope_ext on F16 in libggml-cpu-haswell.so of Debian's llama.cpp 0.7.0):
// for each case, cells 1, 6, 37, 63 with 2 heads of 64. Element i of all cells' keys is ((7919·i mod 8191) - 4095)/1024 in F16, cell
// c is shifted by c²+1, odd cells by the negative.
func TestRotateEqualsTheEngineToTheBit(t *testing.T) {
	want, err := os.ReadFile("testdata/rope-f16.bin")
	if err != nil {
		t.Fatal(err)
	}
	var factors []float32
	for i := range 32 {
		factors = append(factors, 1+float32(i)/4)
	}
	cases := []enclave.Rotation{
		{Dims: 64, Mode: 0, ContextOrig: 4096, Base: 1e4, Scale: 1, AttnFactor: 1},
		{Dims: 64, Mode: 2, ContextOrig: 4096, Base: 1e4, Scale: 1, AttnFactor: 1},
		{Dims: 48, Mode: 2, ContextOrig: 4096, Base: 5e5, Scale: 0.25, AttnFactor: 1},
		{Dims: 64, Mode: 2, ContextOrig: 2048, Base: 1e6, Scale: 0.25, ExtFactor: 1, AttnFactor: 0.9},
		{Dims: 64, Mode: 0, ContextOrig: 8192, Base: 5e5, Scale: 1, AttnFactor: 1, Factors: factors},
		{Dims: 64, Mode: 0, ContextOrig: 2048, Base: 1e6, Scale: 0.125, ExtFactor: 1, AttnFactor: 1, Factors: factors},
	}
	layer := enclave.LayerCache{QueryHeads: 2, KVHeads: 2, DimK: 64, DimV: 1, Cells: 64, Streams: 1}
	for i, r := range cases {
		r.BetaFast, r.BetaSlow = 32, 1
		s := newScene(t, layer, 1)
		c := s.store.(*store).layers[s.id].streams[0]
		for cell := range 64 {
			key := make([]float32, 128)
			for d := range key {
				key[d] = float32((cell*128+d)*7919%8191-4095) / 1024
			}
			if err := c.Put(int64(cell), key, []float32{0, 0}); err != nil {
				t.Fatal(err)
			}
			r.Shift = append(r.Shift, int32(cell*cell+1)*int32(1-cell%2*2))
		}
		if err := s.store.Rotate(s.id, &r); err != nil {
			t.Fatal(err)
		}
		for _, cell := range []int64{1, 6, 37, 63} {
			raw := make([]byte, 2*(128+2))
			if err := c.Export(cell, raw); err != nil {
				t.Fatal(err)
			}
			got := slices.Concat(raw[:128], raw[130:258]) // without the values
			if !bytes.Equal(got, want[:256]) {
				t.Errorf("case %d: cell %d differs from the engine's", i, cell)
			}
			want = want[256:]
		}
	}
}
