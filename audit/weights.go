package audit

import (
	"context"
	"fmt"
)

// The paper's scheme leaves the permuted weights where the attacker reads: row i of the shielded value matrix is, byte for byte, some row
// of the public one, quantised or not, and which one is the permutation (DESIGN of kvshield, section 5). With that known, the
// naive attack works again.
var weightMatching = Attack{
	Key: "weight-matching", Title: "shielded weights matched with public ones", Attacker: A3,
	Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
		if e.Weights == nil {
			return nil, &Skip{"no weights could be read from the accelerator's memory"}
		}
		from, matched := matchRows(e.Weights)
		if matched == 0 {
			return nil, &Skip{"no row of the weights in accelerator memory is a row of the public model"}
		}
		v := e.Snapshot.Layers[0].V
		if len(from) != v.Cols {
			return nil, &Skip{fmt.Sprintf("the value matrix has %d rows, the cache %d columns", len(from), v.Cols)}
		}
		plain := mapRows(v, v.Cols, func(dst, src []float32) {
			for i, j := range from {
				if j >= 0 {
					dst[j] = src[i]
				}
			}
		})
		return nearestTokens(e.Public.V, plain, fmt.Sprintf("values of layer 0, %d of %d rows of its weights matched", matched, len(from))), nil
	},
}

// matchRows finds for each shielded row the public row that it equals, -1 where there is none. Equal public rows are given out in order.
func matchRows(w *Weights) (from []int, matched int) {
	public := map[string][]int{}
	for i, row := range w.PublicV {
		public[string(row)] = append(public[string(row)], i)
	}
	from = make([]int, len(w.ShieldedV))
	for i, row := range w.ShieldedV {
		from[i] = -1
		if rest := public[string(row)]; len(rest) > 0 {
			from[i], public[string(row)] = rest[0], rest[1:]
			matched++
		}
	}
	return from, matched
}
