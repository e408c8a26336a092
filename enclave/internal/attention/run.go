package attention

import (
	"fmt"
	"sync/atomic"
)

const (
	tileRows     = 64      // query rows that share a panel converted once: what keeps their output in the second-level cache
	itemsAThread = 3       // pieces of work, so that an unlucky thread does not hold up the rest
	splitPanels  = 8       // no piece is shorter than this
	aloneBelow   = 1 << 20 // multiplications that are done before another thread has woken up
)

// run is one call of Attend, cut into items: a KV head × a tile of tokens × a range of panels. Few items (decoding with few
// heads) are split further along the cells; whoever finishes the last split of a tile merges them all.
type run struct {
	c      *Cache
	out, q []float32
	mask   Mask
	params Params
	tokens int

	vis        *visibility
	slopes     []float32
	tileTokens int
	tiles      int
	splits     int
	items      int64
	parts      []float32 // of all splits; nil if there is one: its part lies in the thread's scratch memory
	partFloats int

	left []atomic.Int32 // splits of each head and tile that are still to come
	next atomic.Int64
	bad  atomic.Bool

	// For a pool's helpers.
	state  atomic.Int64
	ending chan struct{}
}

// plan cuts the run up for so many threads.
func (r *run) plan(threads int) error {
	s := r.c.shape
	r.tileTokens = min(max(1, tileRows/s.group()), r.tokens)
	r.tiles = (r.tokens + r.tileTokens - 1) / r.tileTokens
	r.splits = 1
	panels := r.vis.hi - r.vis.lo
	if whole := s.KVHeads * r.tiles; threads > 1 && whole < itemsAThread*threads {
		r.splits = max(1, min((itemsAThread*threads+whole-1)/whole, panels/splitPanels))
	}
	r.items = int64(s.KVHeads) * int64(r.tiles) * int64(r.splits)
	if r.slopes == nil {
		r.slopes = Slopes(s.QueryHeads, r.params.MaxBias)
	}
	for _, slope := range r.slopes {
		if !(slope > 0) || !finite(slope) {
			return fmt.Errorf("%w: max_bias %v gives a slope of %v", ErrParams, r.params.MaxBias, slope)
		}
	}
	j := r.job(0)
	r.partFloats = j.partFloats()
	if r.splits > 1 {
		r.left = make([]atomic.Int32, s.KVHeads*r.tiles)
		for i := range r.left {
			r.left[i].Store(int32(r.splits))
		}
	}
	return nil
}

// small says whether waking a helper would take longer than the work.
func (r *run) small() bool {
	s := r.c.shape
	return r.tokens*s.QueryHeads*(s.DimK+s.DimV)*(r.vis.hi-r.vis.lo)*panelCells < aloneBelow
}

// job describes item i. Splits of a tile are neighbours, then the tiles of a head.
func (r *run) job(i int64) job {
	s := r.c.shape
	split := int(i) % r.splits
	tile := int(i) / r.splits % r.tiles
	head := int(i) / r.splits / r.tiles
	at := s.at(0)
	first := tile * r.tileTokens
	panels := r.vis.hi - r.vis.lo
	return job{
		dimK: at.dimK, dimV: at.dimV, dimVP: at.dimVP,
		group: int64(s.group()), head: int64(head), queryHeads: int64(s.QueryHeads),
		first: int64(first), tokens: int64(min(r.tileTokens, r.tokens-first)), rowsMax: int64(r.tileTokens * s.group()),
		panelLo: int64(r.vis.lo + panels*split/r.splits), panelHi: int64(r.vis.lo + panels*(split+1)/r.splits),
		visStride: int64(r.vis.stride),
		maskType:  int64(r.mask.Type), maskCells: int64(r.mask.Cells),
		storage: at.storage,
		kAt:     int64(head) * at.kHead, vAt: at.vAt + int64(head)*at.vHead, kPanel: at.kPanel, vPanel: at.vPanel,
		scale: r.params.Scale, softcap: r.params.LogitSoftcap,
	}
}

// work takes items until none is left. j is a place for their descriptions.
func (r *run) work(scratch []float32, j *job) {
	for {
		i := r.next.Add(1) - 1
		if i >= r.items {
			return
		}
		r.do(i, scratch, j)
	}
}

func (r *run) do(i int64, scratch []float32, j *job) {
	*j = r.job(i)
	kernel := r.c.kernel
	need := j.scratchFloats()
	group := int(i) / r.splits
	part := scratch[need:]
	if r.parts != nil {
		part = r.parts[int(i)*r.partFloats:]
	}
	if !kernel.item(j, r, scratch[:need], part[:r.partFloats]) {
		r.bad.Store(true)
	}
	parts := part
	if r.splits > 1 {
		if r.left[group].Add(-1) > 0 {
			return
		}
		parts = r.parts[group*r.splits*r.partFloats:]
	}
	if !kernel.finish(j, r, parts[:r.splits*r.partFloats], r.splits, r.partFloats) {
		r.bad.Store(true)
	}
}
