package e2e

import (
	"math"
	"testing"
)

// tie is how far, in log-probability, the stock engine's token may be ahead of the one that a shielded engine takes in its place. Sums
// that are taken in another order fall on the other side of a rounding, and a text goes another way from there. The stock engine's own
// log-probabilities, with flash attention and without it, differ by up to 0.018 on the demo model.
const tie = 0.05

// nearest is for how many tokens that could have been a server says how probable they were: those of a near tie are among them.
const nearest = 12

// parting is the step at which a shielded text leaves the stock engine's, and how far stock's token was ahead there of the other, by
// what stock itself said. It is infinite where that is not known, or where a text ends. Texts that do not part have step -1.
func parting(stock, shielded completion) (step int, ahead float64) {
	for i := range max(len(stock.Tokens), len(shielded.Tokens)) {
		switch {
		case i >= len(stock.Tokens) || i >= len(shielded.Tokens):
			return i, math.Inf(1)
		case stock.Tokens[i] != shielded.Tokens[i]:
			return i, stock.logProb(i, stock.Tokens[i]) - stock.logProb(i, shielded.Tokens[i])
		}
	}
	return -1, 0
}

// logProb is a token's at a step, minus infinity where it was not said. A server that holds half a character back has probabilities for
// fewer steps than there are tokens: then none is known to belong to a step.
func (c completion) logProb(step, token int) float64 {
	if len(c.Probs) == len(c.Tokens) {
		for _, p := range c.Probs[step].Top {
			if p.ID == token {
				return p.LogProb
			}
		}
	}
	return math.Inf(-1)
}

// sameText fails the test where a shielded answer is not the stock one, but for a near tie: what follows one is not compared.
func sameText(t *testing.T, what string, stock, shielded completion) {
	t.Helper()
	step, ahead := parting(stock, shielded)
	switch {
	case step >= 0 && !(ahead <= tie): // NaN is no tie
		t.Errorf("%s parts at token %d, where stock's is ahead by %.2g:\nstock:    %q\nshielded: %q", what, step, ahead, stock.Content, shielded.Content)
	case step >= 0:
		t.Logf("%s parts at token %d, a near tie: stock's is ahead by %.2g", what, step, ahead)
	}
}
