package resident

import "math"

// rope is ggml's rotary embedding with YaRN (arXiv 2309.00071), in its single precision and its order of operations
// (ggml/src/ggml-cpu/ops.cpp), so that the engine's results come out to the bit in F16. Products are fused with sums where its
// builds for processors with FMA do so, and rounded on their own elsewhere: without float32(…) a compiler has the choice.
type rope struct {
	from, dims     int
	neox           bool
	scale, step    float32 // of the position; from one pair's angle to the next
	ext, magnitude float32
	low, high      float32 // the pairs between which YaRN goes over from extrapolation to interpolation
	factors        []float32
	shift          int32 // that cos and sin were made for
	cos, sin       []float32
}

// correction is the pair that makes so many turns over the original context.
func correction(dims int, context int32, turns, base float32) float32 {
	ratio := float32(context) / float32(float32(turns*2)*float32(math.Pi))
	return float32(float32(dims)*log32(ratio)) / float32(2*log32(base))
}

func log32(x float32) float32 { return float32(math.Log(float64(x))) }

// fma is x·y + z: the product of two float32 is exact in float64.
func fma(x, y, z float32) float32 { return float32(float64(x)*float64(y) + float64(z)) }

// ramp is 1 for pairs that are extrapolated, 0 for those that are interpolated.
func (r *rope) ramp(pair int) float32 {
	y := (float32(pair) - r.low) / max(0.001, r.high-r.low)
	return 1 - min(1, max(0, y))
}

// prepare computes the angles of a shift; false: one is not finite.
func (r *rope) prepare(shift int32) bool {
	if shift == r.shift && len(r.cos) > 0 {
		return true
	}
	r.shift, r.cos, r.sin = shift, r.cos[:0], r.sin[:0]
	magnitude := r.magnitude
	if r.ext != 0 {
		magnitude *= fma(0.1, log32(1/r.scale), 1)
	}
	fine := true
	theta := float32(shift)
	for pair := range r.dims / 2 {
		extrapolated := theta
		if r.factors != nil {
			extrapolated /= r.factors[pair]
		}
		angle := r.scale * extrapolated
		if r.ext != 0 {
			mix := r.ramp(pair) * r.ext
			angle = fma(angle, 1-mix, float32(extrapolated*mix))
		}
		c, s := float32(math.Cos(float64(angle)))*magnitude, float32(math.Sin(float64(angle)))*magnitude
		r.cos, r.sin = append(r.cos, c), append(r.sin, s)
		fine = fine && c-c == 0 && s-s == 0
		theta *= r.step
	}
	if !fine {
		r.cos = r.cos[:0]
	}
	return fine
}

// keepsLength says that a turn by no angle changes nothing. With YaRN it scales.
func (r *rope) keepsLength() bool { return r.ext == 0 && r.magnitude == 1 }

// turn rotates one head's key by the prepared angles.
func (r *rope) turn(key []float32) {
	key = key[r.from:]
	for pair, c := range r.cos {
		i, j := 2*pair, 2*pair+1
		if r.neox {
			i, j = pair, pair+r.dims/2
		}
		x, y, s := key[i], key[j], r.sin[pair]
		key[i] = fma(x, c, -float32(y*s))
		key[j] = fma(x, s, float32(y*c))
	}
}

// hadamard multiplies each n elements by the orthonormal Walsh-Hadamard matrix, which is its own inverse.
func hadamard(x []float32, n int) {
	scale := float32(1 / math.Sqrt(float64(n)))
	for ; len(x) >= n; x = x[n:] {
		block := x[:n]
		for half := 1; half < n; half *= 2 {
			for i := range block {
				if i&half == 0 {
					block[i], block[i+half] = block[i]+block[i+half], block[i]-block[i+half]
				}
			}
		}
		for i := range block {
			block[i] *= scale
		}
	}
}
