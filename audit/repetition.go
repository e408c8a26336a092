package audit

import (
	"cmp"
	"context"
	"math"
	"slices"
)

// Layer 0 caches the same value for the same token, wherever it stands, and so does every static mask: which rows are alike tells
// which tokens are, and how often a class occurs which token it may be (frequency analysis; equality patterns: masking study
// of kvshield, docs/threat-model.md).
var repetition = Attack{
	Key: "repetition", Title: "which tokens are the same, and how frequent", Attacker: A2, Grows: true,
	Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
		v := e.Snapshot.Layers[0].V
		if isZero(v.Data) {
			return nil, errNothing
		}
		products := timesTransposed(v, v)
		away := func(i, j int) float64 {
			d := products.Row(i)[i] + products.Row(j)[j] - 2*products.Row(i)[j]
			return math.Sqrt(float64(max(d, 0))) / math.Sqrt(float64(max(products.Row(i)[i], products.Row(j)[j], math.SmallestNonzeroFloat32)))
		}
		classes := classesOf(v.Rows, away)
		return &Guess{
			Tokens:  byFrequency(classes, e.Public.Prior),
			Alike:   func(i, j int) float64 { return -away(i, j) },
			Classes: classes,
			Where:   "values of layer 0",
		}, nil
	},
}

// alikeWithin is the relative distance up to which two rows are taken for the same token: rounding to F16 or Q8_0 makes less,
// two tokens more.
const alikeWithin = 0.02

// classesOf numbers the rows by the first row that each is alike to.
func classesOf(n int, away func(i, j int) float64) []int {
	classes := make([]int, n)
	var first []int // row of each class
	for i := range classes {
		c := slices.IndexFunc(first, func(j int) bool { return away(i, j) < alikeWithin })
		if c < 0 {
			c = len(first)
			first = append(first, i)
		}
		classes[i] = c
	}
	return classes
}

// byFrequency gives the most frequent class the most frequent token, and so on.
func byFrequency(classes []int, prior []float64) []int32 {
	count := make([]int, len(classes))
	for _, c := range classes {
		count[c]++
	}
	rank := ranked(len(classes), func(c int) float64 { return float64(count[c]) })
	tokens := ranked(len(prior), func(t int) float64 { return prior[t] })
	token := make([]int32, len(classes))
	for i, c := range rank {
		token[c] = -1
		if i < len(tokens) {
			token[c] = int32(tokens[i])
		}
	}
	out := make([]int32, len(classes))
	for i, c := range classes {
		out[i] = token[c]
	}
	return out
}

// ranked are 0 to n-1, those of the highest score first.
func ranked(n int, score func(int) float64) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = i
	}
	slices.SortStableFunc(out, func(a, b int) int { return cmp.Compare(score(b), score(a)) })
	return out
}
