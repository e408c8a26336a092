package attention

import (
	"fmt"
	"unsafe"
)

// Params are the op's parameters.
type Params struct {
	Scale        float32   // of q·k
	MaxBias      float32   // ALiBi's, 0 for none; see Slopes
	LogitSoftcap float32   // logits become cap·tanh(logit/cap); 0 for none
	Sinks        []float32 // a logit for each query head that takes weight and gives no value; nil for none
	Pool         *Pool     // nil: one thread, and scratch memory for this call only, which is slow
}

// Attend writes softmax(scale·q·kᵀ + mask)·v into out, tokens × QueryHeads × DimV. The queries q are tokens × QueryHeads × DimK,
// so their length says how many tokens there are. See the package for the semantics.
func Attend(out, q []float32, c *Cache, m Mask, p Params) error {
	if c == nil {
		return fmt.Errorf("%w: no cache", ErrParams)
	}
	err := attend(out, q, c, m, p)
	if err != nil && !overlap(out, q) {
		clear(out)
	}
	return err
}

func attend(out, q []float32, c *Cache, m Mask, p Params) error {
	s := c.shape
	tokens := len(q) / (s.QueryHeads * s.DimK)
	if len(q) != tokens*s.QueryHeads*s.DimK || len(out) != tokens*s.QueryHeads*s.DimV {
		return fmt.Errorf("%w: queries of %d and output of %d floats, want multiples of %d and %d",
			ErrLength, len(q), len(out), s.QueryHeads*s.DimK, s.QueryHeads*s.DimV)
	}
	if overlap(out, q) {
		return fmt.Errorf("%w: queries and output overlap", ErrLength)
	}
	if err := p.validate(s); err != nil {
		return err
	}
	if err := m.validate(tokens, c.cells); err != nil {
		return err
	}
	if tokens == 0 {
		return nil
	}
	pool := p.Pool
	if pool == nil {
		pool = NewPool(1)
		defer pool.Close()
	}
	return pool.attend(&run{c: c, out: out, q: q, mask: m, params: p, tokens: tokens})
}

func (p *Params) validate(s Shape) error {
	switch {
	case !finite(p.Scale) || !finite(p.MaxBias) || !finite(p.LogitSoftcap):
		return fmt.Errorf("%w: scale %v, max_bias %v, softcap %v", ErrParams, p.Scale, p.MaxBias, p.LogitSoftcap)
	case p.LogitSoftcap != 0 && !finite(p.Scale/p.LogitSoftcap):
		return fmt.Errorf("%w: softcap %v", ErrParams, p.LogitSoftcap)
	case p.Sinks != nil && len(p.Sinks) != s.QueryHeads:
		return fmt.Errorf("%w: %d sinks for %d query heads", ErrParams, len(p.Sinks), s.QueryHeads)
	}
	for _, sink := range p.Sinks {
		if !finite(sink) {
			return fmt.Errorf("%w: sink %v", ErrParams, sink)
		}
	}
	return nil
}

func overlap(a, b []float32) bool {
	if len(a) == 0 || len(b) == 0 {
		return false
	}
	first, second := uintptr(unsafe.Pointer(&a[0])), uintptr(unsafe.Pointer(&b[0]))
	return first < second+uintptr(len(b))*4 && second < first+uintptr(len(a))*4
}
