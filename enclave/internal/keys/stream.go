package keys

import "math/rand/v2"

// Stream is the randomness of one sub-key.
type Stream struct{ source *rand.ChaCha8 }

func newStream(seed *[Size]byte) *Stream { return &Stream{rand.NewChaCha8(*seed)} }

// Shuffle puts p in a uniformly random order (Fisher and Yates).
func (s *Stream) Shuffle(p []uint16) {
	for i := len(p) - 1; i > 0; i-- {
		j := s.below(uint64(i + 1))
		p[i], p[j] = p[j], p[i]
	}
}

// Bit returns 0 or 1.
func (s *Stream) Bit() uint16 { return uint16(s.source.Uint64() >> 63) }

// below returns a uniform number in [0, n). Draws beyond the last whole multiple of n are thrown
// away: reducing them as well would favour small numbers.
func (s *Stream) below(n uint64) uint64 {
	limit := 1<<32 - (1<<32)%n
	for {
		if x := s.source.Uint64() >> 32; x < limit {
			return x % n
		}
	}
}

// Close overwrites the state. The stream must not be used afterwards.
func (s *Stream) Close() { s.source.Seed([Size]byte{}) }
