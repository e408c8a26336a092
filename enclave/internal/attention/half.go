package attention

import "math"

// halfBits rounds to IEEE 754 binary16, ties to even, as F16C and NEON do.
func halfBits(f float32) uint16 {
	b := math.Float32bits(f)
	sign, mag := uint16(b>>16)&0x8000, b&0x7fffffff
	switch {
	case mag > 0x7f800000:
		return sign | 0x7e00
	case mag >= 0x477ff000: // 65520 and more round to infinity
		return sign | 0x7c00
	case mag < 0x38800000: // below 2^-14: subnormal, a multiple of 2^-24; adding 0.5 lets the FPU round
		shifted := math.Float32frombits(mag) + 0.5
		return sign | uint16(math.Float32bits(shifted)-0x3f000000)
	}
	return sign | uint16((mag-0x38000000+0x0fff+(mag>>13&1))>>13)
}

// halfFloat is the value of a binary16.
func halfFloat(h uint16) float32 {
	sign, exp, frac := uint32(h&0x8000)<<16, uint32(h>>10)&31, uint32(h&0x3ff)
	switch exp {
	case 0:
		f := float32(frac) * (1.0 / (1 << 24))
		return math.Float32frombits(math.Float32bits(f) | sign)
	case 31:
		return math.Float32frombits(sign | 0x7f800000 | frac<<13)
	}
	return math.Float32frombits(sign | (exp+112)<<23 | frac<<13)
}

func finite(f float32) bool { return math.Float32bits(f)&0x7f800000 != 0x7f800000 }

func halfFinite(h uint16) bool { return h&0x7c00 != 0x7c00 }
