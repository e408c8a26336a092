package audit

import (
	"context"
	"sync"
)

// Public is what anybody computes from the public model.
type Public struct {
	HeadsKV int
	// K and V are layer 0's rows for each token of the vocabulary, as the engine caches them: V × (heads·dimension). Keys
	// are at position 0, where the rotary embedding does nothing.
	K, V   Matrix
	Rotary Rotary
	// Prior is how frequent each token is in text that the model writes by itself. Sums up to 1.
	Prior []float64
	// Start is the token that a conversation begins with, negative when the model has none.
	Start int32

	once   sync.Once
	ranked []int // tokens, the most frequent first
}

// Weights are rows of layer 0's attention matrices, byte by byte: of the public file, and as they lie in accelerator memory.
type Weights struct{ PublicV, ShieldedV [][]byte }

// Engine runs the public model for an attacker who tries tokens.
type Engine interface {
	// Extend continues the prefix by one token and returns the cached rows of that token in all layers, and the
	// tokens that are likely to follow, the likeliest first.
	Extend(ctx context.Context, prefix []int32, token int32) (*Step, error)
}

// Step is what an engine caches for one token.
type Step struct {
	Layers []Layer // of one row each
	Next   []int32
}
