package audit

import "context"

const (
	anchorsMax   = 64
	anchorRounds = 4
)

// Inner products between cached rows survive every permutation and rotation. The rows whose norms tell their token without
// doubt serve as anchors; every other row is then recognised by its products with them (Gram matrices: docs/threat-model.md;
// alignment by inner products: arXiv 2508.09442, section 4).
var gramMatrix = Attack{
	Key: "gram-matrix", Title: "inner products with rows of unmistakable norm", Attacker: A2, Grows: true,
	Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
		l := e.Snapshot.Layers[0]
		found := newIndex(normsOf(e.Public.HeadsKV, e.Public.K, e.Public.V)).nearest(normsOf(e.Public.HeadsKV, l.K, l.V))
		for range anchorRounds {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			anchors := surest(found, anchorsMax)
			if len(anchors) == 0 {
				break
			}
			rows, tokens := NewMatrix(len(anchors), l.V.Cols), NewMatrix(len(anchors), l.V.Cols)
			for i, a := range anchors {
				copy(rows.Row(i), l.V.Row(a))
				copy(tokens.Row(i), e.Public.V.Row(int(found[a].row)))
			}
			found = newIndex(timesTransposed(e.Public.V, tokens)).nearest(timesTransposed(l.V, rows))
		}
		return guessOf(found, "values of layer 0"), nil
	},
}

// surest are at most n rows of which the token is sure, one for each token.
func surest(found []match, n int) []int {
	var out []int
	seen := map[int32]bool{}
	for i, m := range found {
		if len(out) < n && m.sure() && !seen[m.row] {
			seen[m.row] = true
			out = append(out, i)
		}
	}
	return out
}
