package memory

import (
	"cmp"
	"encoding/binary"
	"reflect"
	"slices"
	"testing"
)

// cells are hits at some cells of a cache; the token is the cell's number.
func cells(kind string, base, stride uint64, numbers ...uint64) (hits []Hit) {
	for _, n := range numbers {
		hits = append(hits, Hit{Address: base + n*stride, Token: int32(n), Type: kind})
	}
	return hits
}

func merged(lists ...[]Hit) []Hit {
	all := slices.Concat(lists...)
	slices.SortStableFunc(all, func(a, b Hit) int { return cmp.Compare(a.Address, b.Address) })
	return all
}

func TestRuns(t *testing.T) {
	for name, test := range map[string]struct {
		hits []Hit
		want []Run
	}{
		"none":     {},
		"one":      {cells(F16, 4096, 128, 3), []Run{{4096 + 384, 0, F16, []int32{3}}}},
		"gaps":     {cells(F16, 4096, 128, 0, 1, 2, 5, 6, 20, 21), []Run{{4096, 128, F16, []int32{0, 1, 2, -1, -1, 5, 6}}, {4096 + 20*128, 128, F16, []int32{20, 21}}}},
		"gap at 1": {cells(F16, 0, 128, 0, 2, 3, 4), []Run{{0, 128, F16, []int32{0, -1, 2, 3, 4}}}},
		"longest gap": {cells(F32, 0, 64, 0, 1, 2, 7, 13, 14), []Run{{0, 64, F32, []int32{0, 1, 2, -1, -1, -1, -1, 7}},
			{13 * 64, 64, F32, []int32{13, 14}}}},
		"hits, not cells, make a run long": {merged(cells(F16, 0, 128, 0, 1, 6), cells(F16, 1<<20, 128, 0, 1, 2, 3)),
			[]Run{{1 << 20, 128, F16, []int32{0, 1, 2, 3}}, {0, 128, F16, []int32{0, 1, -1, -1, -1, -1, 6}}}},
		"padded rows": {cells(F16, 96, 4096, 0, 1, 2, 3), []Run{{96, 4096, F16, []int32{0, 1, 2, 3}}}},
		"types":       {merged(cells(F32, 0, 128, 0, 1, 2), cells(F16, 0, 128, 0, 1)), []Run{{0, 128, F32, []int32{0, 1, 2}}, {0, 128, F16, []int32{0, 1}}}},
		"interleaved": {merged(cells(F16, 0, 1024, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), cells(F16, 32, 1024, 0, 5, 6, 11)),
			[]Run{{0, 1024, F16, []int32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}}, {32, 1024, F16, []int32{0, -1, -1, -1, -1, 5, 6, -1, -1, -1, -1, 11}}}},
		"two memories": {slices.Concat(cells(F16, 256, 128, 0, 1, 2), cells(F16, 128, 128, 0, 1)),
			[]Run{{256, 128, F16, []int32{0, 1, 2}}, {128, 128, F16, []int32{0, 1}}}},
		"the nearest at one place": {[]Hit{{Address: 64, Token: 1, Type: F16, Distance: 0.01}, {Address: 64, Token: 2, Type: F16, Distance: 0.001}},
			[]Run{{64, 0, F16, []int32{2}}}},
		"far apart": {cells(F16, 0, 1<<40, 0, 1), []Run{{0, 0, F16, []int32{0}}, {1 << 40, 0, F16, []int32{1}}}},
	} {
		before := slices.Clone(test.hits)
		if got := Runs(test.hits); !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s:\n%+v, not\n%+v", name, got, test.want)
		}
		if !slices.Equal(before, test.hits) {
			t.Errorf("%s: the hits were changed", name)
		}
	}
}

// FuzzRuns makes hits of six bytes each, ascending addresses, and asks that each is in one run, at its place.
func FuzzRuns(f *testing.F) {
	f.Add([]byte{0, 0, 128, 0, 1, 0, 0, 0, 128, 0, 2, 1, 0, 0, 128, 0, 3, 0, 0, 1, 0, 0, 4, 0})
	f.Add([]byte{255, 255, 255, 255, 1, 0, 255, 255, 255, 255, 2, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		type place struct {
			address uint64
			kind    string
		}
		var hits []Hit
		want := map[place]int32{}
		at := ^uint64(0) - 1<<38
		for ; len(data) >= 6 && at < ^uint64(0)-1<<32; data = data[6:] {
			at += uint64(binary.BigEndian.Uint32(data)) + 1
			kind := []string{F16, F32}[data[5]&1]
			hits = append(hits, Hit{Address: at, Token: int32(data[4]), Type: kind})
			want[place{at, kind}] = int32(data[4])
		}
		before := len(hits) + 1
		for _, r := range Runs(hits) {
			if r.matched() > before || r.Tokens[0] < 0 || r.Tokens[len(r.Tokens)-1] < 0 {
				t.Errorf("%+v after one of %d", r, before)
			}
			before = r.matched()
			gap := 0
			for i, token := range r.Tokens {
				if token < 0 {
					if gap++; gap > gapMax {
						t.Errorf("a gap of %d cells", gap)
					}
					continue
				}
				gap = 0
				p := place{r.Address + uint64(i)*r.Stride, r.Type}
				if known, ok := want[p]; !ok || known != token {
					t.Errorf("token %d at %+v, where %d is", token, p, known)
				}
				delete(want, p)
			}
		}
		if len(want) != 0 {
			t.Errorf("%d hits are in no run", len(want))
		}
	})
}
