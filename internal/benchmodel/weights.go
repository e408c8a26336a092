package main

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"io"
	"math"
	"math/rand/v2"

	"github.com/kvshield/kvshield/internal/gguf"
)

// chunk is how many weights are made at a time: a multiple of every block.
const chunk = 32 << 10

// noise draws the weights of one matrix, uniform with the variance that keeps activations at their
// size.
type noise struct {
	random *rand.PCG
	limit  float32
}

// newNoise seeds by name, so that a tensor's weights do not depend on the tensors before it.
func newNoise(seed uint64, name string, columns int64) *noise {
	h := fnv.New64a()
	h.Write([]byte(name))
	return &noise{rand.NewPCG(seed, h.Sum64()), float32(math.Sqrt(3 / float64(columns)))}
}

func (s *noise) write(w io.Writer, kind gguf.Type, count int64) error {
	buf := make([]byte, 0, 4*chunk)
	for count > 0 {
		n := min(count, chunk)
		switch kind {
		case gguf.F32:
			buf = s.floats(buf[:0], n)
		case gguf.F16:
			buf = s.halves(buf[:0], n)
		case gguf.Q8_0:
			buf = s.blocks(buf[:0], n)
		default:
			return fmt.Errorf("no weights of type %v", kind)
		}
		if _, err := w.Write(buf); err != nil {
			return err
		}
		count -= n
	}
	return nil
}

// next is uniform between -limit and limit.
func (s *noise) next() float32 {
	return (float32(s.random.Uint64()>>40)/(1<<23) - 1) * s.limit
}

func (s *noise) floats(buf []byte, n int64) []byte {
	for range n {
		buf = binary.LittleEndian.AppendUint32(buf, math.Float32bits(s.next()))
	}
	return buf
}

func (s *noise) halves(buf []byte, n int64) []byte {
	for range n {
		buf = binary.LittleEndian.AppendUint16(buf, half(s.next()))
	}
	return buf
}

// blocks makes Q8_0: a scale in half precision and 32 signed bytes.
func (s *noise) blocks(buf []byte, n int64) []byte {
	scale := half(s.limit / 127)
	for range n / 32 {
		buf = binary.LittleEndian.AppendUint16(buf, scale)
		for range 4 {
			buf = binary.LittleEndian.AppendUint64(buf, s.random.Uint64())
		}
	}
	return buf
}

// half converts a number below 1 in size to half precision, towards zero; what is too small for a
// normal number becomes zero.
func half(x float32) uint16 {
	bits := math.Float32bits(x)
	sign := uint16(bits >> 16 & 0x8000)
	exponent := int(bits>>23&0xff) - 127 + 15
	if exponent <= 0 {
		return sign
	}
	return sign | uint16(exponent)<<10 | uint16(bits>>13&0x3ff)
}

func writeFloats(w io.Writer, values []float32) error {
	buf := make([]byte, 0, 4*len(values))
	for _, v := range values {
		buf = binary.LittleEndian.AppendUint32(buf, math.Float32bits(v))
	}
	_, err := w.Write(buf)
	return err
}
