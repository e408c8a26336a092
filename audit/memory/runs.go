package memory

import (
	"cmp"
	"slices"
)

const (
	gapMax     = 4       // cells in a row that may match nothing within a run
	strideMax  = 1 << 20 // bytes from one cell to the next
	stridesMax = 8       // tried for the hits of one memory and type
)

// Run is a sequence of rows at equal distances: a piece of a cache, found without knowing its place.
type Run struct {
	Address uint64
	Stride  uint64 // bytes from one cell to the next; 0 for a run of one
	Type    string
	Tokens  []int32 // -1 for a cell that matched nothing
}

// matched is the number of cells that are no gaps.
func (r *Run) matched() int {
	n := 0
	for _, t := range r.Tokens {
		if t >= 0 {
			n++
		}
	}
	return n
}

// Runs is the function [Runs].
func (s *Scanner) Runs(hits []Hit) []Run { return Runs(hits) }

// Runs puts hits together that lie at equal distances, with gaps of at most 4 cells. The distances are those that are seen
// most often between neighbours. Every hit is in exactly one run, alone if need be; the run of the most hits comes first.
//
// The hits are in ascending order of addresses, as a scan gives them. Where an address is lower than the one before, the hits of another
// memory begin.
func Runs(hits []Hit) []Run {
	var out []Run
	for len(hits) > 0 {
		n := 1
		for n < len(hits) && hits[n].Address >= hits[n-1].Address {
			n++
		}
		byType := map[string][]Hit{}
		for _, h := range hits[:n] {
			byType[h.Type] = append(byType[h.Type], h)
		}
		for _, list := range byType {
			out = append(out, runsOf(nearest(list))...)
		}
		hits = hits[n:]
	}
	slices.SortStableFunc(out, func(a, b Run) int {
		return cmp.Or(cmp.Compare(b.matched(), a.matched()), cmp.Compare(a.Address, b.Address), cmp.Compare(a.Type, b.Type))
	})
	return out
}

// nearest keeps, of hits at one address, the nearest.
func nearest(hits []Hit) []Hit {
	out := hits[:0]
	for _, h := range hits {
		switch n := len(out); {
		case n == 0 || out[n-1].Address != h.Address:
			out = append(out, h)
		case h.Distance < out[n-1].Distance:
			out[n-1] = h
		}
	}
	return out
}

// runsOf are the runs of hits of one type, at ascending addresses.
func runsOf(hits []Hit) (out []Run) {
	for _, stride := range strides(hits) {
		var found []Run
		found, hits = chains(hits, stride)
		out = append(out, found...)
	}
	for _, h := range hits {
		out = append(out, Run{h.Address, 0, h.Type, []int32{h.Token}})
	}
	return out
}

// strides are the distances seen most often between neighbours, the most frequent first.
func strides(hits []Hit) []uint64 {
	seen := map[uint64]int{}
	for i := 1; i < len(hits); i++ {
		if d := hits[i].Address - hits[i-1].Address; d <= strideMax {
			seen[d]++
		}
	}
	out := make([]uint64, 0, len(seen))
	for d := range seen {
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b uint64) int { return cmp.Or(cmp.Compare(seen[b], seen[a]), cmp.Compare(a, b)) })
	return out[:min(len(out), stridesMax)]
}

// chains takes the runs of at least two hits with this stride out of hits, and returns the rest in order.
func chains(hits []Hit, stride uint64) (runs []Run, rest []Hit) {
	// Cells of one cache have the same remainder: sorted by it, they are neighbours.
	slices.SortFunc(hits, func(a, b Hit) int {
		return cmp.Or(cmp.Compare(a.Address%stride, b.Address%stride), cmp.Compare(a.Address, b.Address))
	})
	for len(hits) > 0 {
		n := 1
		for n < len(hits) && follows(hits[n-1].Address, hits[n].Address, stride) {
			n++
		}
		if n == 1 {
			rest = append(rest, hits[0])
		} else {
			runs = append(runs, chain(hits[:n], stride))
		}
		hits = hits[n:]
	}
	slices.SortFunc(rest, func(a, b Hit) int { return cmp.Compare(a.Address, b.Address) })
	return runs, rest
}

// follows says whether b is a few cells behind a.
func follows(a, b, stride uint64) bool {
	return b > a && (b-a)%stride == 0 && (b-a)/stride <= gapMax+1
}

func chain(hits []Hit, stride uint64) Run {
	r := Run{hits[0].Address, stride, hits[0].Type, []int32{hits[0].Token}}
	for i := 1; i < len(hits); i++ {
		for range (hits[i].Address-hits[i-1].Address)/stride - 1 {
			r.Tokens = append(r.Tokens, -1)
		}
		r.Tokens = append(r.Tokens, hits[i].Token)
	}
	return r
}
