package audit

import "context"

// A permutation, and any rotation, keeps the length of every head of values and of keys; the rotary embedding keeps a key's too.
// Two numbers for each head tell the token (orthogonal masks and their invariants: arXiv 2508.09442, section 4).
var headNorms = Attack{
	Key: "head-norms", Title: "norms of each head", Attacker: A2,
	Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
		l := e.Snapshot.Layers[0]
		return nearestTokens(normsOf(e.Public.HeadsKV, e.Public.K, e.Public.V), normsOf(e.Public.HeadsKV, l.K, l.V), "keys and values of layer 0"), nil
	},
}

func normsOf(heads int, k, v Matrix) Matrix {
	return beside(mapRows(k, heads, sortedNorms(heads)), mapRows(v, heads, sortedNorms(heads)))
}
