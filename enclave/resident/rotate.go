package resident

import (
	"math"
	"slices"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/attention"
)

const modeNeox = 2

func (s *store) Rotate(id enclave.CacheID, r *enclave.Rotation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, err := s.layer(id)
	if err != nil {
		return err
	}
	turner, err := l.rope(r)
	if err != nil {
		return err
	}
	bytes, err := s.secret(4 * l.shape.KVHeads * l.shape.DimK)
	if err != nil {
		return err
	}
	defer s.done(bytes)
	keys := floats(bytes)
	return l.each(int64(r.First), int64(len(r.Shift)), func(c *attention.Cache, place, n, at int64) error {
		for i := range n {
			shift := r.Shift[at+i]
			if shift == 0 && turner.keepsLength() || !c.Written(place+i) {
				continue
			}
			if !turner.prepare(shift) {
				return l.misfit("a rotation whose angles are not finite")
			}
			if err := l.turn(c, place+i, keys, turner, r.Hadamard); err != nil {
				return err
			}
		}
		return nil
	})
}

// turn rotates the keys of one cell.
func (l *layer) turn(c *attention.Cache, cell int64, keys []float32, by *rope, block int) error {
	if err := c.Keys(cell, keys); err != nil {
		return l.wrap(err)
	}
	for h := range l.shape.KVHeads {
		key := keys[h*l.shape.DimK:][:l.shape.DimK]
		if block > 0 {
			hadamard(key, block)
		}
		by.turn(key)
		if block > 0 {
			hadamard(key, block)
		}
	}
	return l.wrap(c.PutKeys(cell, keys))
}

// rope checks a rotation and copies what it takes of it.
func (l *layer) rope(r *enclave.Rotation) (*rope, error) {
	switch {
	case r == nil:
		return nil, l.misfit("no rotation")
	case r.Mode != 0 && r.Mode != modeNeox:
		return nil, l.misfit("rotary embedding of mode %d: 0 (norm) and %d (neox) can be shifted", r.Mode, modeNeox)
	case r.Dims < 2 || r.From < 0 || r.From > l.shape.DimK || r.Dims > l.shape.DimK-r.From || r.Dims%2 != 0:
		return nil, l.misfit("rotation of %d rows of %d from row %d on", r.Dims, l.shape.DimK, r.From)
	case len(r.Factors) != 0 && len(r.Factors) != r.Dims/2:
		return nil, l.misfit("%d frequency factors for %d rows", len(r.Factors), r.Dims)
	case r.Hadamard < 0 || r.Hadamard&(r.Hadamard-1) != 0 || r.Hadamard > 0 && l.shape.DimK%r.Hadamard != 0:
		return nil, l.misfit("Hadamard matrix of size %d over a head of %d", r.Hadamard, l.shape.DimK)
	}
	made := &rope{
		from: r.From, dims: r.Dims, neox: r.Mode == modeNeox, scale: r.Scale, ext: r.ExtFactor, magnitude: r.AttnFactor,
		step:    float32(math.Pow(float64(r.Base), float64(-2/float32(r.Dims)))),
		factors: slices.Clone(r.Factors),
	}
	if len(made.factors) == 0 {
		made.factors = nil
	}
	floor := math.Floor(float64(correction(r.Dims, r.ContextOrig, r.BetaFast, r.Base)))
	ceil := math.Ceil(float64(correction(r.Dims, r.ContextOrig, r.BetaSlow, r.Base)))
	made.low, made.high = max(0, float32(floor)), min(float32(r.Dims-1), float32(ceil))
	return made, nil
}
