package memory

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"syscall"
	"testing"

	"github.com/kvshield/kvshield/audit"
)

func TestPlantedRowsAreFound(t *testing.T) {
	want := conversation(1000)
	for _, columns := range []int{32, 64, 80, 100, 512} {
		m := dictionary(1, testTokens, columns)
		s := NewScanner(m)
		if s.Tokens() != testTokens {
			t.Fatalf("%d of %d tokens can be found", s.Tokens(), testTokens)
		}
		for _, kind := range []string{F16, F32} {
			for _, noise := range []float64{0, 0.001, 0.005} {
				t.Run(fmt.Sprintf("%d %s, noise %g", columns, kind, noise), func(t *testing.T) {
					const at = 200_032 // so that rows lie across the border of two chunks
					memory := random(7, at+(len(want)+10)*rowBytes(kind, columns))
					plant(memory[at:], m, want, kind, noise)
					hits := scanAll(t, s, memory, 0)
					if columns == 32 && noise > 0 && len(hits) > 970 {
						return // so few numbers that the hashes share most of them
					}
					if len(hits) != len(want) {
						t.Fatalf("%d hits for %d rows", len(hits), len(want))
					}
					for i, h := range hits {
						if h.Address != uint64(at+i*rowBytes(kind, columns)) || h.Token != want[i] || h.Type != kind {
							t.Fatalf("hit %d is %+v, not token %d", i, h, want[i])
						}
						// F16 rounds by up to 2^-11.
						if d := float64(h.Distance); d < 0.5*noise || d > 2*noise+0.0005 {
							t.Errorf("distance %g with noise of %g", d, noise)
						}
					}
				})
			}
		}
	}
}

func TestRowsFurtherOffAreNot(t *testing.T) {
	m := dictionary(1, testTokens, 512)
	memory := make([]byte, 100*1024)
	plant(memory, m, conversation(100), F16, 0.03)
	if hits := scanAll(t, NewScanner(m), memory, 0); len(hits) != 0 {
		t.Errorf("%d rows at a distance of 3 %% are taken for hits: %+v", len(hits), hits[0])
	}
}

// pattern is endless memory of one repeated piece.
type pattern []byte

func (p pattern) ReadAt(b []byte, at int64) (int, error) {
	for n := 0; n < len(b); {
		n += copy(b[n:], p[(int(at)+n)%len(p):])
	}
	return len(b), nil
}

func numbers32(v float32) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint32(nil, math.Float32bits(v)), 16)
}

func TestNothingIsFoundWhereNothingIs(t *testing.T) {
	other := make([]byte, 300*rowBytes(F16, testColumns))
	plant(other, dictionary(2, testTokens, testColumns), conversation(300), F16, 0)
	m := dictionary(1, testTokens, testColumns)
	for i, v := range []float32{0, 1, -1, float32(math.NaN()), float32(math.Inf(-1)), math.MaxFloat32, math.SmallestNonzeroFloat32} {
		for c := range m.Row(i) {
			m.Row(i)[c] = v
		}
	}
	s := NewScanner(m)
	if s.Tokens() != testTokens-7 {
		t.Errorf("%d of %d tokens can be found", s.Tokens(), testTokens-7)
	}
	for name, memory := range map[string][]byte{
		"zeros": make([]byte, 64), "ones, F16": bytes.Repeat([]byte{0, 0x3c}, 32), "ones": numbers32(1), "minus ones": numbers32(-1), "NaN": numbers32(float32(math.NaN())),
		"all bits": bytes.Repeat([]byte{255}, 64), "minus infinity": numbers32(float32(math.Inf(-1))), "large": numbers32(math.MaxFloat32),
		"small": numbers32(math.SmallestNonzeroFloat32), "other rows": other, "minus zeros": bytes.Repeat([]byte{0, 0x80}, 32),
	} {
		err := s.Scan(t.Context(), pattern(memory), 0, 1<<20, func(h Hit) { t.Fatalf("%s: %+v", name, h) })
		if err != nil {
			t.Error(err)
		}
	}
}

func TestNothingIsFoundInRandomMemory(t *testing.T) {
	s := NewScanner(dictionary(1, testTokens, testColumns))
	memory := random(3, 64<<20)
	if hits := scanAll(t, s, memory, 0); len(hits) != 0 {
		t.Errorf("%d hits, such as %+v", len(hits), hits[0])
	}
}

func TestEqualRowsAreTheLowestToken(t *testing.T) {
	m := dictionary(1, testTokens, testColumns)
	for _, token := range []int{700, 20, 2999} {
		copy(m.Row(token), m.Row(11))
	}
	s := NewScanner(m)
	if s.Tokens() != testTokens-3 {
		t.Errorf("%d tokens can be found", s.Tokens())
	}
	memory := make([]byte, 4*rowBytes(F32, testColumns))
	plant(memory, m, []int32{700, 20, 11, 2999}, F32, 0.002)
	hits := scanAll(t, s, memory, 0)
	if len(hits) != 4 || slices.ContainsFunc(hits, func(h Hit) bool { return h.Token != 11 }) {
		t.Errorf("%+v", hits)
	}
}

// Tokens that were never trained have rows that differ by less than the tolerance.
func TestAlikeRowsAreTheNearest(t *testing.T) {
	m := dictionary(1, testTokens, testColumns)
	for token := 100; token < 120; token++ {
		copy(m.Row(token), m.Row(99))
		m.Row(token)[token-100] += 0.02
	}
	memory := make([]byte, 20*rowBytes(F32, testColumns))
	var want []int32
	for token := int32(100); token < 120; token++ {
		want = append(want, token)
	}
	plant(memory, m, want, F32, 0)
	hits := scanAll(t, NewScanner(m), memory, 0)
	if len(hits) != len(want) {
		t.Fatalf("%d hits for %d rows", len(hits), len(want))
	}
	for i, h := range hits {
		if h.Token != want[i] {
			t.Errorf("token %d was taken for %d", want[i], h.Token)
		}
	}
}

func TestCrowdedBucketsAreCapped(t *testing.T) {
	m := dictionary(1, testTokens, testColumns)
	for i, v := range m.Data {
		m.Data[i] = float32(math.Abs(float64(v)))
	}
	if n := NewScanner(m).Tokens(); n != bucketMax {
		t.Errorf("%d tokens of the same signs are searched for, not %d", n, bucketMax)
	}
}

// holed is memory of which some pages refuse to be read.
type holed struct {
	memory []byte
	holes  []int // pages
}

func (h holed) ReadAt(b []byte, at int64) (int, error) {
	end := len(h.memory)
	for _, p := range h.holes {
		if p*page+page > int(at) {
			end = min(end, max(p*page, int(at)))
		}
	}
	n := copy(b, h.memory[at:end])
	if n < len(b) {
		return n, syscall.EIO
	}
	return n, nil
}

func TestHolesAreSkipped(t *testing.T) {
	m := dictionary(1, testTokens, testColumns)
	want := conversation(10_000)
	row := rowBytes(F16, testColumns)
	memory := make([]byte, len(want)*row)
	plant(memory, m, want, F16, 0)
	holes := []int{0, 3, 4, chunk/page - 1, chunk / page, chunk/page + 5, 200}
	s := NewScanner(m)
	var hits []Hit
	var sum counted
	err := s.scan(t.Context(), source{ReaderAt: holed{memory, holes}}, []span{{end: uint64(len(memory))}}, func(h []Hit, n counted) error {
		hits = append(hits, h...)
		sum.read += n.read
		sum.holes += n.holes
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	next := 0
	for i, token := range want {
		if slices.Contains(holes, i*row/page) {
			continue
		}
		if next == len(hits) || hits[next].Token != token || hits[next].Address != uint64(i*row) {
			t.Fatalf("row %d was not found, after %d hits", i, next)
		}
		next++
	}
	if next != len(hits) {
		t.Errorf("%d hits too many", len(hits)-next)
	}
	if sum.holes != uint64(len(holes)*page) || sum.read+sum.holes != uint64(len(memory)) {
		t.Errorf("%+v for %d pages of holes in %d bytes", sum, len(holes), len(memory))
	}
}

func TestMemoryThatEnds(t *testing.T) {
	m := dictionary(1, testTokens, testColumns)
	memory := make([]byte, 1000)
	plant(memory, m, []int32{5}, F16, 0)
	found := 0
	err := NewScanner(m).Scan(t.Context(), bytes.NewReader(memory), 0, 1<<30, func(Hit) { found++ })
	if !errors.Is(err, io.ErrUnexpectedEOF) || found != 1 {
		t.Errorf("%v after %d hits", err, found)
	}
}

type failing struct{ err error }

func (f failing) ReadAt([]byte, int64) (int, error) { return 0, f.err }

func TestScanErrors(t *testing.T) {
	s := NewScanner(dictionary(1, 100, testColumns))
	lost := errors.New("cable pulled")
	if err := s.Scan(t.Context(), failing{lost}, 0, 1<<30, func(Hit) {}); !errors.Is(err, lost) {
		t.Errorf("a failing reader: %v", err)
	}
	if err := s.Scan(t.Context(), failing{nil}, 0, 1<<30, func(Hit) {}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a reader that reads nothing: %v", err)
	}
	for _, r := range [][2]uint64{{5, 4}, {0, math.MaxUint64}} {
		if err := s.Scan(t.Context(), pattern{0}, r[0], r[1], func(Hit) {}); err == nil {
			t.Errorf("from %#x to %#x was taken for memory", r[0], r[1])
		}
	}
}

func TestScanStopsWhenTold(t *testing.T) {
	m := dictionary(1, 100, testColumns)
	row := make([]byte, rowBytes(F32, testColumns))
	put(row, m.Row(3), F32, 0, nil)
	ctx, cancel := context.WithCancel(t.Context())
	err := NewScanner(m).Scan(ctx, pattern(row), 0, 1<<50, func(Hit) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestBadDictionary(t *testing.T) {
	for _, m := range []audit.Matrix{
		{Rows: 2, Cols: 64, Data: make([]float32, 3)}, {Rows: 1, Cols: 8, Data: make([]float32, 8)}, {Rows: 1 << 40, Cols: 1 << 40}, {Rows: -1, Cols: 64}, {},
	} {
		s := NewScanner(m)
		if err := s.Scan(t.Context(), bytes.NewReader(nil), 0, 1, func(Hit) {}); !errors.Is(err, ErrDictionary) || s.Tokens() != 0 {
			t.Errorf("%d × %d: %v", m.Rows, m.Cols, err)
		}
	}
	if err := NewScanner(audit.NewMatrix(0, 64)).Scan(t.Context(), pattern{0}, 0, 4096, func(Hit) {}); err != nil {
		t.Errorf("a dictionary of no rows: %v", err)
	}
}

func TestHalf(t *testing.T) {
	for h, want := range map[uint16]float64{0: 0, 0x3c00: 1, 0xc000: -2, 0x7bff: 65504, 0x0001: 0x1p-24, 0x83ff: -0x3ffp-24, 0x0400: 0x1p-14, 0x3555: 0x1.554p-2, 0x7c00: math.Inf(1), 0xfc00: math.Inf(-1)} {
		if got := float64(half(h)); got != want {
			t.Errorf("%#04x is %g, not %g", h, got, want)
		}
	}
	if v := half(0x7e00); v == v {
		t.Errorf("0x7e00 is %g", v)
	}
}

func BenchmarkScan(b *testing.B) {
	s := NewScanner(dictionary(1, 128_256, 512))
	for name, memory := range map[string][]byte{"random": random(1, 64<<20), "zeros": make([]byte, 64<<20)} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(memory)))
			for b.Loop() {
				if err := s.Scan(context.Background(), bytes.NewReader(memory), 0, uint64(len(memory)), func(Hit) {}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkNewScanner(b *testing.B) {
	m := dictionary(1, 128_256, 512)
	b.ReportAllocs()
	for b.Loop() {
		NewScanner(m)
	}
}
