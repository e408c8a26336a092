package resident

import (
	"fmt"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/attention"
)

// Attend stores first and attends then. The slices may lie in memory that the engine still writes to: they are numbers only, and
// whatever they become, nothing is indexed by them.
func (s *store) Attend(id enclave.CacheID, a *enclave.Attention) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.attend(id, a)
	if err != nil && a != nil {
		clear(a.Out)
	}
	return err
}

func (s *store) attend(id enclave.CacheID, a *enclave.Attention) error {
	l, err := s.layer(id)
	if err != nil {
		return err
	}
	if a == nil || a.Slot < 0 || a.Slot >= len(s.slots) || !s.slots[a.Slot].live {
		return fmt.Errorf("%w: attention without a batch", enclave.ErrCache)
	}
	b := &s.slots[a.Slot]
	if err := l.check(a, len(b.cells)); err != nil {
		return err
	}
	if err := b.fit(l); err != nil {
		return err
	}
	if err := l.put(a, b); err != nil {
		return err
	}
	return l.answer(a, b, s.r.pool)
}

// check compares the ranges with the batch's tokens and the lengths with the ranges.
func (l *layer) check(a *enclave.Attention, tokens int) error {
	for _, part := range [][2]int{{a.PutFirst, a.PutCount}, {a.QueryFirst, a.QueryCount}} {
		if part[0] < 0 || part[1] < 0 || part[1] > tokens || part[0] > tokens-part[1] {
			return l.misfit("tokens %d and %d more of a batch of %d", part[0], part[1], tokens)
		}
	}
	h := l.shape
	for _, list := range []struct {
		name      string
		got, want int
	}{
		{"keys", len(a.K), a.PutCount * h.KVHeads * h.DimK},
		{"values", len(a.V), a.PutCount * h.KVHeads * h.DimV},
		{"queries", len(a.Q), a.QueryCount * h.QueryHeads * h.DimK},
		{"results", len(a.Out), a.QueryCount * h.QueryHeads * h.DimV},
	} {
		if list.got != list.want {
			return l.misfit("%d floats of %s, want %d", list.got, list.name, list.want)
		}
	}
	if len(a.Sinks) != 0 && len(a.Sinks) != h.QueryHeads {
		return l.misfit("%d sinks for %d query heads", len(a.Sinks), h.QueryHeads)
	}
	return nil
}

// put stores the keys and values that came along.
func (l *layer) put(a *enclave.Attention, b *batch) error {
	k, v := l.shape.KVHeads*l.shape.DimK, l.shape.KVHeads*l.shape.DimV
	for i := range a.PutCount {
		c, place, err := l.find(b.cells[a.PutFirst+i])
		if err != nil {
			return err
		}
		if err := c.Put(place, a.K[i*k:][:k], a.V[i*v:][:v]); err != nil {
			return l.wrap(err)
		}
	}
	return nil
}

// answer computes attention, block by block: each has a stream and a mask of its own.
func (l *layer) answer(a *enclave.Attention, b *batch, pool *attention.Pool) error {
	p := attention.Params{Scale: a.Scale, MaxBias: a.MaxBias, LogitSoftcap: a.LogitSoftcap, Pool: pool}
	if len(a.Sinks) > 0 {
		p.Sinks = a.Sinks
	}
	q, out := l.shape.QueryHeads*l.shape.DimK, l.shape.QueryHeads*l.shape.DimV
	size := len(b.cells) / b.blocks
	for at := 0; at < a.QueryCount; {
		token := a.QueryFirst + at
		block := token / size
		n := min(a.QueryCount-at, (block+1)*size-token)
		err := attention.Attend(a.Out[at*out:][:n*out], a.Q[at*q:][:n*q], l.streams[b.streams[block]], b.rows(block, token%size, n), p)
		if err != nil {
			return l.wrap(err)
		}
		at += n
	}
	return nil
}
