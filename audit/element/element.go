// Package element turns elements of a KV cache into numbers. Call [Floats], after [Known] has said yes.
package element

import (
	"encoding/binary"
	"math"

	"github.com/kvshield/kvshield/internal/gguf"
)

const (
	bf16 gguf.Type = 30
	q8   gguf.Type = 8 // blocks of an F16 scale and 32 signed bytes
)

// Known says whether elements of the type can be read.
func Known(t gguf.Type) bool {
	switch t {
	case gguf.F32, gguf.F16, bf16, q8:
		return true
	}
	return false
}

// Floats reads as many elements as dst holds from src, which must hold whole blocks of a known type.
func Floats(dst []float32, t gguf.Type, src []byte) {
	le := binary.LittleEndian
	switch t {
	case gguf.F32:
		for i := range dst {
			dst[i] = math.Float32frombits(le.Uint32(src[4*i:]))
		}
	case gguf.F16:
		for i := range dst {
			dst[i] = Half(le.Uint16(src[2*i:]))
		}
	case bf16:
		for i := range dst {
			dst[i] = math.Float32frombits(uint32(le.Uint16(src[2*i:])) << 16)
		}
	case q8:
		for i := range dst {
			block := src[i/32*34:]
			dst[i] = Half(le.Uint16(block)) * float32(int8(block[2+i%32]))
		}
	}
}

// Half widens an F16 (IEEE 754 binary16).
func Half(h uint16) float32 {
	sign, exponent, fraction := uint32(h>>15)<<31, uint32(h>>10&31), uint32(h&1023)
	switch exponent {
	case 0:
		v := float32(fraction) / (1 << 24)
		return math.Float32frombits(math.Float32bits(v) | sign)
	case 31:
		return math.Float32frombits(sign | 0xff<<23 | fraction<<13)
	}
	return math.Float32frombits(sign | (exponent+112)<<23 | fraction<<13)
}

// Unrotate takes back the Hadamard rotation that engines apply to quantised caches, block by block of a power of two of
// elements: the matrix (Sylvester's, normalised) is public and its own inverse.
func Unrotate(data []float32, block int) {
	scale := float32(1 / math.Sqrt(float64(block)))
	for at := 0; at+block <= len(data); at += block {
		hadamard(data[at:at+block], scale)
	}
}

// hadamard multiplies with Sylvester's matrix.
func hadamard(x []float32, scale float32) {
	for half := 1; half < len(x); half *= 2 {
		for i := 0; i < len(x); i += 2 * half {
			for j := i; j < i+half; j++ {
				x[j], x[j+half] = x[j]+x[j+half], x[j]-x[j+half]
			}
		}
	}
	for i := range x {
		x[i] *= scale
	}
}
