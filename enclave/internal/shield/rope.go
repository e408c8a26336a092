package shield

import (
	"math"

	"github.com/kvshield/kvshield/enclave"
)

// Rope is which rows of a head a rotary embedding turns together.
type Rope int

// The layouts, with the names that ggml gives them.
const (
	RopeNone Rope = iota // no rotary embedding
	RopeNorm             // rows 2j and 2j+1
	RopeNeox             // rows j and j+n/2, n being the number of rotated rows
)

// pair returns the two rows of pair j among n rotated rows.
func (r Rope) pair(j, n int) (int, int) {
	if r == RopeNeox {
		return j, j + n/2
	}
	return 2 * j, 2*j + 1
}

// pairPlace is one place for a rotary pair: which pair of the true model stands there, and whether
// its two rows are swapped. It is kept as one word.
type pairPlace uint16

func (p pairPlace) pair() int     { return int(p >> 1) }
func (p pairPlace) swapped() bool { return p&1 == 1 }

// factors computes the frequency factors that take every pair's frequency along to its new place.
// Place j turns by theta_j/factor_j and must turn by theta_k/own_k, k being the pair that stands
// there; a swapped pair turns backwards.
//
// The engine computes theta_j by multiplying with an F32 step j times, so the exact power of that
// rounded step is what its products scatter around; the power of the unrounded step is not.
func factors(places []uint16, n int, base float32, own []float32) ([]float32, error) {
	step := float64(float32(math.Pow(float64(base), float64(-2/float32(n)))))
	list := make([]float32, len(places))
	for j, word := range places {
		place := pairPlace(word)
		f := math.Pow(step, float64(j-place.pair()))
		if own != nil {
			f *= float64(own[place.pair()])
		}
		if place.swapped() {
			f = -f
		}
		list[j] = float32(f)
		if !usable(list[j]) {
			return nil, enclave.Invalid("the frequency factors of the model cannot be permuted: its rotary base %g or its own factors are out of range", base)
		}
	}
	return list, nil
}

// usable is false for what would stop a pair from turning, or lose most of its precision.
func usable(f float32) bool {
	abs := math.Abs(float64(f))
	return abs >= 0x1p-126 && abs <= math.MaxFloat32
}
