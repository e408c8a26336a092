package attention

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"testing"
)

var sentinels = []error{ErrShape, ErrCell, ErrLength, ErrMask, ErrParams, ErrUnwritten, ErrNotFinite}

func isOurs(err error) bool {
	return slices.ContainsFunc(sentinels, func(s error) bool { return errors.Is(err, s) })
}

// FuzzAttend makes all arguments of bytes. Whatever they say: an error of ours and a zero output, or finite numbers on which
// all kernels agree.
func FuzzAttend(f *testing.F) {
	seed := func(shape, sizes, data []byte, scale, bias, softcap float32) {
		f.Add(shape, sizes, data, scale, bias, softcap)
	}
	zeros := make([]byte, 4096)
	seed([]byte{4, 2, 40, 24, 0}, []byte{1, 40, 40, 1, 1, 1}, zeros, 0.1, 0, 0)
	seed([]byte{4, 2, 40, 24, 1}, []byte{1, 40, 64, 1, 2, 4}, slices.Repeat([]byte{0, 0xfc}, 2048), 0.1, 0, 0)
	seed([]byte{6, 3, 64, 64, 2}, []byte{3, 33, 64, 3, 2, 1}, slices.Repeat([]byte{0, 0xbc, 0, 0}, 2048), 0.125, 8, 30)
	seed([]byte{1, 1, 1, 1, 0}, []byte{0, 1, 0, 0, 1, 1}, zeros, 1, 0, 0)
	seed([]byte{0, 0, 0, 0, 9}, []byte{255, 255, 255, 255, 7, 255}, zeros, 1, 0, 0)
	seed([]byte{2, 1, 8, 8, 0}, []byte{1, 4, 4, 1, 1, 1}, []byte{0, 0x7e}, 1, 0, 0)
	f.Fuzz(func(t *testing.T, shape, sizes, data []byte, scale, bias, softcap float32) {
		if len(shape) < 5 || len(sizes) < 6 {
			t.Skip()
		}
		// Small, so that many are tried; Go's remainder keeps the sign.
		s := Shape{int(int8(shape[0]) % 9), int(int8(shape[1]) % 9), int(int8(shape[2]) % 70), int(int8(shape[3]) % 70), Storage(int8(shape[4]))}
		var outs [][]float32
		for _, k := range kernels() {
			out, ok := fuzzAttend(t, k, s, sizes, data, Params{Scale: scale, MaxBias: bias, LogitSoftcap: softcap})
			if !ok {
				return
			}
			outs = append(outs, out)
		}
		for i, x := range outs[0] {
			if math.IsNaN(float64(x)) || math.IsInf(float64(x), 0) {
				t.Fatalf("float %d is %v", i, x)
			}
		}
	})
}

// fuzzAttend fills a cache and attends with what the bytes say; false: a cache of this shape cannot be.
func fuzzAttend(t *testing.T, k *kernel, s Shape, sizes, data []byte, p Params) ([]float32, bool) {
	c, err := newCache(s, 300, k)
	if err != nil {
		if !errors.Is(err, ErrShape) {
			t.Fatalf("error %v, want ErrShape", err)
		}
		return nil, false
	}
	defer c.Close()
	numbers := func(n, from int) []float32 {
		x := make([]float32, n)
		for i := range x {
			if at := (from + i) * 4 % max(len(data), 1); at+4 <= len(data) {
				x[i] = math.Float32frombits(binary.LittleEndian.Uint32(data[at:]))
			}
		}
		return x
	}
	for cell := range int(sizes[1]) {
		if err := c.Put(int64(cell)*int64(int8(sizes[5])), numbers(s.KVHeads*s.DimK, cell), numbers(s.KVHeads*s.DimV, 3*cell)); err != nil && !isOurs(err) {
			t.Fatal(err)
		}
	}
	tokens := int(sizes[0] % 6)
	m := Mask{Type: MaskType(int8(sizes[4])), Cells: int(int8(sizes[2])), Rows: int(int8(sizes[3]))}
	m.Data = data[:min(len(data), max(0, m.Cells*m.Rows*m.elementBytes()))]
	if sizes[0] > 200 {
		m.Cells, m.Rows = m.Cells<<56, m.Rows<<57
	}
	out := normalOnes(max(0, tokens*s.QueryHeads*s.DimV))
	err = Attend(out, numbers(tokens*s.QueryHeads*s.DimK, 7), c, m, p)
	if err != nil && !isOurs(err) {
		t.Fatal(err)
	}
	if err != nil {
		allZero(t, out)
	}
	return out, true
}

// FuzzPut: any numbers are stored and read back near enough, or refused.
func FuzzPut(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4}, uint8(0), int64(0))
	f.Add([]byte{0, 0, 0xc0, 0x7f}, uint8(1), int64(5))
	f.Add([]byte{0, 0, 0x80, 0x3f, 1, 0, 0, 0}, uint8(2), int64(255))
	f.Add([]byte{}, uint8(2), int64(-1))
	f.Fuzz(func(t *testing.T, data []byte, storage uint8, cell int64) {
		s := Shape{1, 1, 40, 40, Storage(storage % 3)}
		x := make([]float32, 40)
		for i := range x {
			if i*4+4 <= len(data) {
				x[i] = math.Float32frombits(binary.LittleEndian.Uint32(data[i*4:]))
			}
		}
		for _, k := range kernels() {
			c, err := newCache(s, 300, k)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := c.Put(cell, x, x); err != nil {
				if !errors.Is(err, ErrCell) && !errors.Is(err, ErrNotFinite) {
					t.Fatal(err)
				}
				continue
			}
			back, value := make([]float32, 40), make([]float32, 40)
			if err := c.Get(cell, back, value); err != nil {
				t.Fatal(err)
			}
			for i := range x {
				near(t, k, s.Type, x, i, back[i])
				near(t, k, s.Type, x, i, value[i])
			}
		}
	})
}

// near checks one number against the storage's step: F16's is 2^-10 of the number or 2^-24, Q8_0's 1/127 of the block's largest,
// which itself is off by the F16 rounding of the scale (subnormal below 2^-14).
func near(t *testing.T, k *kernel, s Storage, x []float32, i int, got float32) {
	t.Helper()
	var step float64
	switch s {
	case F16:
		step = math.Max(math.Abs(float64(x[i]))/1024, 1.0/(1<<24))
	case Q8_0:
		top := 0.0
		for _, f := range x[i/32*32 : min(len(x), i/32*32+32)] {
			top = math.Max(top, math.Abs(float64(f)))
		}
		step = top/127*2 + top/1024 + 128.0/(1<<24)
	}
	if diff := math.Abs(float64(got) - float64(x[i])); !(diff <= step) {
		t.Fatalf("%s, %v: %v came back as %v", k.name, s, x[i], got)
	}
}
