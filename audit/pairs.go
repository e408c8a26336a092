package audit

import "context"

// A permutation that keeps attention exact moves rotary pairs as wholes, and the rotary embedding only turns them: the pairs'
// magnitudes, sorted within each head, stay (masking study of kvshield, docs/threat-model.md).
var pairMagnitudes = Attack{
	Key: "pair-magnitudes", Title: "sorted magnitudes of a key's rotary pairs", Attacker: A2,
	Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
		of := func(keys Matrix) Matrix { return sortedMagnitudes(e.Public.Rotary, e.Public.HeadsKV, keys) }
		return nearestTokens(of(e.Public.K), of(e.Snapshot.Layers[0].K), "keys of layer 0"), nil
	},
}

func sortedMagnitudes(r Rotary, heads int, keys Matrix) Matrix {
	cols, f := r.magnitudes(heads)
	m := mapRows(keys, cols(keys.Cols), f)
	sortedCols, sorted := sortedSum(heads)
	return mapRows(m, sortedCols(m.Cols), sorted)
}
