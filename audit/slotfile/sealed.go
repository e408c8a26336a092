package slotfile

import (
	"bytes"
	"encoding/binary"
	"math"

	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/audit/element"
	"github.com/kvshield/kvshield/internal/gguf"
)

// sealedMagic is what a state begins with that an enclave has sealed (docs/protocol.md, section 6).
var sealedMagic = []byte("KVSEALED")

// IsSealed says whether a file's content was sealed by an enclave.
func IsSealed(b []byte) bool { return bytes.HasPrefix(b, sealedMagic) }

// Sealed lays out the bytes of a sealed file as if they were the rows of a cache, F16, so that attacks have something to try. The
// file does not say how many tokens it holds; bytes are used again where there are too few.
func Sealed(b []byte, shape Shape, tokens int) *audit.Snapshot {
	width := shape.HeadsKV * shape.HeadDim
	s := &audit.Snapshot{Source: audit.SlotFile, Type: "F16", HeadsKV: shape.HeadsKV}
	at := 0
	matrix := func() audit.Matrix {
		raw := make([]byte, 2*tokens*width)
		for done := 0; done < len(raw); {
			n := copy(raw[done:], b[at:])
			done, at = done+n, (at+n)%len(b)
		}
		m := audit.NewMatrix(tokens, width)
		for i := 0; i < len(raw); i += 2 {
			if h := binary.LittleEndian.Uint16(raw[i:]); h&0x7c00 == 0x7c00 { // no number, which no cache holds
				raw[i+1] &^= 0x40
			}
		}
		element.Floats(m.Data, gguf.F16, raw)
		for i, v := range m.Data {
			if math.IsNaN(float64(v)) {
				m.Data[i] = 0
			}
		}
		return m
	}
	for range shape.Layers {
		s.Layers = append(s.Layers, audit.Layer{K: matrix(), V: matrix()})
	}
	return s
}
