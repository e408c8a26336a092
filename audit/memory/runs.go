package memory

import (
	"cmp"
	"slices"
)

// gapMax is how many cells in a row may match nothing within a run.
const gapMax = 4

// Run is a sequence of rows that lie one behind the other: a piece of a cache, found without knowing its place.
type Run struct {
	Address uint64
	Type    string
	Tokens  []int32 // -1 for a cell that matched nothing
}

// Runs puts hits, in ascending order of addresses, together. The longest run comes first.
func (s *Scanner) Runs(hits []Hit) []Run {
	var out []Run
	for _, l := range s.layouts {
		var run *Run
		var last uint64
		for _, h := range hits {
			if h.Type != l.name {
				continue
			}
			step := h.Address - last
			if run == nil || step%uint64(l.row) != 0 || step/uint64(l.row) > gapMax+1 {
				out = append(out, Run{Address: h.Address, Type: h.Type, Tokens: []int32{h.Token}})
				run, last = &out[len(out)-1], h.Address
				continue
			}
			for range step/uint64(l.row) - 1 {
				run.Tokens = append(run.Tokens, -1)
			}
			run.Tokens, last = append(run.Tokens, h.Token), h.Address
		}
	}
	slices.SortStableFunc(out, func(a, b Run) int { return cmp.Compare(len(b.Tokens), len(a.Tokens)) })
	return out
}
