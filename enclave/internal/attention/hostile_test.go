package attention

import (
	"errors"
	"fmt"
	"math"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// request is the arguments of one Attend, to be spoilt.
type request struct {
	out, q []float32
	mask   Mask
	params Params
}

func TestAttendRejects(t *testing.T) {
	inf, nan := float32(math.Inf(1)), float32(math.NaN())
	tests := []struct {
		name  string
		spoil func(r *request)
		want  error
	}{
		{"nothing wrong", func(r *request) {}, nil},
		{"no tokens", func(r *request) { r.out, r.q = nil, nil }, nil},
		{"part of a query", func(r *request) { r.q = r.q[:len(r.q)-1] }, ErrLength},
		{"short output", func(r *request) { r.out = r.out[1:] }, ErrLength},
		{"output for more tokens", func(r *request) { r.q = r.q[:160] }, ErrLength},
		{"no output", func(r *request) { r.out = nil }, ErrLength},
		{"in place", func(r *request) { r.q = append(r.out, r.out...)[:320]; r.out = r.q[10:202] }, ErrLength},
		{"unknown mask", func(r *request) { r.mask.Type = 3 }, ErrMask},
		{"negative mask type", func(r *request) { r.mask.Type = -1 }, ErrMask},
		{"short mask", func(r *request) { r.mask.Data = r.mask.Data[2:] }, ErrMask},
		{"long mask", func(r *request) { r.mask.Data = append(r.mask.Data, 0, 0) }, ErrMask},
		{"no mask data", func(r *request) { r.mask.Data = nil }, ErrMask},
		{"too few rows", func(r *request) { r.mask.Rows, r.mask.Data = 1, r.mask.Data[:128] }, ErrMask},
		{"more rows than tokens", func(r *request) { r.mask.Rows, r.mask.Data = 64, make([]byte, 64*128) }, nil},
		{"negative cells", func(r *request) { r.mask.Cells = -64 }, ErrMask},
		{"negative cells and rows", func(r *request) { r.mask.Cells, r.mask.Rows = -64, -2 }, ErrMask},
		{"huge mask", func(r *request) { r.mask.Cells, r.mask.Rows = math.MaxInt, math.MaxInt }, ErrMask},
		{"mask whose size wraps", func(r *request) { r.mask.Cells, r.mask.Rows, r.mask.Data = 1<<31, 1<<32, nil }, ErrMask},
		{"mask shows too much", func(r *request) { r.mask.Cells, r.mask.Data = 128, make([]byte, 2*2*128) }, ErrUnwritten},
		{"no mask over too many cells", func(r *request) { r.mask = Mask{Cells: 65} }, ErrMask},
		{"NaN in the mask", func(r *request) { r.mask.Data[1] = 0x7e }, ErrMask},
		{"+infinity in the mask", func(r *request) { r.mask.Data[129] = 0x7c }, ErrMask},
		{"infinite scale", func(r *request) { r.params.Scale = inf }, ErrParams},
		{"NaN for max_bias", func(r *request) { r.params.MaxBias = nan }, ErrParams},
		{"huge max_bias", func(r *request) { r.params.MaxBias = 1e30 }, ErrParams},
		{"negative max_bias", func(r *request) { r.params.MaxBias = -8 }, nil},
		{"NaN for softcap", func(r *request) { r.params.LogitSoftcap = nan }, ErrParams},
		{"tiny softcap", func(r *request) { r.params.LogitSoftcap = 1e-45 }, ErrParams},
		{"too few sinks", func(r *request) { r.params.Sinks = make([]float32, 3) }, ErrParams},
		{"empty sinks", func(r *request) { r.params.Sinks = []float32{} }, ErrParams},
		{"infinite sink", func(r *request) { r.params.Sinks = []float32{0, 0, 0, -inf} }, ErrParams},
		{"NaN in a query", func(r *request) { r.q[5] = nan }, ErrNotFinite},
		{"NaN in the last query", func(r *request) { r.q[len(r.q)-1] = nan }, ErrNotFinite},
		{"infinite query", func(r *request) { r.q[200] = -inf }, ErrNotFinite},
		{"query that overflows", func(r *request) { fill(r.q, 3e38) }, ErrNotFinite},
		{"query that overflows downwards", func(r *request) { fill(r.q, -3e38) }, ErrNotFinite},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, k := range kernels() {
				l := newLayer(small, 2, 64, 1)
				for _, key := range l.k {
					fill(key, 2)
				}
				l.causal(0)
				r := &request{out: normalOnes(2 * 4 * 24), q: l.q, mask: l.bytes(MaskF16, 64), params: l.params}
				tt.spoil(r)
				if err := Attend(r.out, r.q, l.cache(t, k), r.mask, r.params); !errors.Is(err, tt.want) {
					t.Fatalf("%s: error %v, want %v", k.name, err, tt.want)
				}
				if tt.want != nil && tt.name != "in place" {
					allZero(t, r.out)
				}
			}
		})
	}
	if err := Attend(nil, nil, nil, Mask{}, Params{}); !errors.Is(err, ErrParams) {
		t.Errorf("no cache: error %v, want ErrParams", err)
	}
}

func fill(x []float32, f float32) {
	for i := range x {
		x[i] = f
	}
}

// After an error nobody may mistake what is there for an answer.
func allZero(t *testing.T, out []float32) {
	t.Helper()
	for i, x := range out {
		if x != 0 {
			t.Fatalf("float %d of the output is %v after an error", i, x)
		}
	}
}

// guarded returns n floats that end where the address space does: one float further is a fault.
func guarded(t testing.TB, n int) []float32 {
	t.Helper()
	page := os.Getpagesize()
	size := roundUp(n*4, page)
	m, err := unix.Mmap(-1, 0, size+page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(m) })
	if err := unix.Mprotect(m[size:], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	return unsafe.Slice((*float32)(unsafe.Pointer(&m[size-n*4])), n)
}

func copied(t testing.TB, x []float32) []float32 {
	g := guarded(t, len(x))
	copy(g, x)
	return g
}

// The C kernels stay inside every slice and page they are given, whatever the dimensions.
func TestNothingOutsideTheSlicesIsTouched(t *testing.T) {
	for _, dims := range [][2]int{{64, 64}, {40, 24}, {33, 7}, {1, 1}, {80, 72}} {
		for _, storage := range []Storage{F16, F32, Q8_0} {
			for _, tokens := range []int{1, 3, 40} {
				for _, k := range kernels() {
					t.Run(fmt.Sprintf("%d and %d/%v/%d/%s", dims[0], dims[1], storage, tokens, k.name), func(t *testing.T) {
						testGuards(t, Shape{3, 1, dims[0], dims[1], storage}, tokens, k)
					})
				}
			}
		}
	}
}

func testGuards(t *testing.T, s Shape, tokens int, k *kernel) {
	l := newLayer(s, tokens, 251, 13) // the last panel of the mask is short
	l.causal(0)
	l.params.Sinks = copied(t, []float32{1, 2, 3})
	mem := guarded(t, s.pageBytes()/4)
	memory := unsafe.Slice((*byte)(unsafe.Pointer(&mem[0])), s.pageBytes())
	c := &Cache{shape: s, cells: 256, kernel: k, written: make([]uint32, 8)}
	c.pages, c.table = []*page{{mem: memory}}, []uintptr{uintptr(unsafe.Pointer(&memory[0]))}
	for cell := range l.cells {
		if err := c.Put(int64(cell), copied1(t, l.k[cell], cell), copied1(t, l.v[cell], cell)); err != nil {
			t.Fatal(err)
		}
	}
	for _, typ := range []MaskType{MaskF16, MaskF32} {
		m := l.bytes(typ, l.cells)
		data := guarded(t, (len(m.Data)+3)/4)
		bytes := unsafe.Slice((*byte)(unsafe.Pointer(&data[0])), len(data)*4)
		bytes = bytes[len(bytes)-len(m.Data):]
		copy(bytes, m.Data)
		m.Data = bytes
		r := &run{c: c, out: guarded(t, tokens*s.QueryHeads*s.DimV), q: copied(t, l.q), mask: m, params: l.params, tokens: tokens, vis: &visibility{}}
		if err := r.vis.see(&m, tokens); err != nil {
			t.Fatal(err)
		}
		if err := r.plan(1); err != nil {
			t.Fatal(err)
		}
		j := r.job(0)
		r.work(guarded(t, j.scratchFloats()+r.partFloats), &job{})
		if r.bad.Load() {
			t.Fatal("not finite")
		}
		worst(t, r.out, l.rounded(t, c).attend(), tolerance(s))
	}
}

// copied1 guards only some cells: each guard is two mappings.
func copied1(t *testing.T, x []float32, cell int) []float32 {
	if cell%100 == 0 {
		return copied(t, x)
	}
	return x
}
