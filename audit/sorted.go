package audit

import "context"

// A permutation keeps a head's numbers: sorted, they are as recognisable as before (DESIGN of kvshield, section 2; hidden states:
// arXiv 2505.18332, section 5).
var sortedValues = Attack{
	Key: "sorted-values", Title: "sorted values of each head", Attacker: A2,
	Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
		cols, sorted := sortedSum(e.Public.HeadsKV)
		dictionary := mapRows(e.Public.V, cols(e.Public.V.Cols), sorted)
		v := e.Snapshot.Layers[0].V
		return nearestTokens(dictionary, mapRows(v, cols(v.Cols), sorted), "values of layer 0"), nil
	},
}
