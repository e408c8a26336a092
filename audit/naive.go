package audit

import "context"

// The paper's attacker (KV-Shield, arXiv 2409.04040, section 3): computes from the public weights what layer 0 caches for each
// token of the vocabulary, and takes the nearest.
var naiveValues = Attack{
	Key: "naive-values", Title: "nearest layer-0 value", Attacker: A1,
	Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
		return nearestTokens(e.Public.V, e.Snapshot.Layers[0].V, "values of layer 0"), nil
	},
}

// The same with keys, once the rotary embedding is undone.
var naiveKeys = Attack{
	Key: "naive-keys", Title: "nearest layer-0 key, rotary embedding undone", Attacker: A1,
	Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
		return nearestTokens(e.Public.K, e.Public.Rotary.Undone(e.Snapshot), "keys of layer 0"), nil
	},
}

// nearestTokens guesses for each row the token whose row in the dictionary is nearest.
func nearestTokens(dictionary, rows Matrix, where string) *Guess {
	return guessOf(newIndex(dictionary).nearest(rows), where)
}

func guessOf(found []match, where string) *Guess {
	g := &Guess{Tokens: make([]int32, len(found)), Where: where}
	for i, m := range found {
		g.Tokens[i] = m.row
	}
	return g
}
