package attention

import "unsafe"

// job is kvs_job of kernel.h: one piece of work, the queries of some tokens and one group of heads, over some panels.
type job struct {
	dimK, dimV, dimVP        int64
	group, head, queryHeads  int64
	first, tokens, rowsMax   int64
	panelLo, panelHi         int64
	visStride                int64
	maskType, maskCells      int64
	storage                  int64
	kAt, vAt, kPanel, vPanel int64
	scale, softcap           float32
}

// place is kvs_cell of kernel.h: where a cell lies in its page.
type place struct {
	dimK, dimV, dimVP, kvHeads, storage, cell int64
	kAt, vAt, kHead, vHead, kPanel, vPanel    int64
}

// kernel is one implementation of the arithmetic. All of them work on the same store and the same partial results.
type kernel struct {
	name string
	// item writes the partial result of a job; false: a query is not finite.
	item func(j *job, a *run, scratch, part []float32) bool
	// finish writes the output of a job's tokens from partial results `stride` floats apart; false: one is not finite.
	finish func(j *job, a *run, parts []float32, splits, stride int) bool
	// put stores a cell; false: a number is not finite in this storage.
	put func(p *place, k, v []float32, page []byte) bool
}

// best returns the fastest kernel that this machine runs. The list is never empty.
func best() *kernel { return kernels()[0] }

// Level names the instructions in use: avx512, avx2, neon or portable.
func Level() string { return best().name }

func (s Shape) at(cell int64) place {
	k, v := s.panelBytes()
	return place{
		dimK: int64(s.DimK), dimV: int64(s.DimV), dimVP: int64(s.paddedV()), kvHeads: int64(s.KVHeads),
		storage: int64(s.Type), cell: cell,
		vAt:   int64(k * pagePanels * s.KVHeads),
		kHead: int64(k * pagePanels), vHead: int64(v * pagePanels), kPanel: int64(k), vPanel: int64(v),
	}
}

const (
	blockPanels = 4
	blockCells  = blockPanels * panelCells
)

// scratchFloats is the room that item needs; block_item.h cuts it up.
func (j *job) scratchFloats() int {
	rows, k, vp, blocks := int(j.rowsMax), int(j.dimK), int(j.dimVP), q8Blocks(int(j.dimV))
	return roundUp(rows*k, lane) + rows*blockCells + roundUp(rows, lane) + k*panelCells + vp*blockCells + blocks*blockCells + blockCells
}

// partFloats is the size of a partial result: each row's largest logit, its sum of weights, its weighted sum of values.
func (j *job) partFloats() int {
	rows := int(j.rowsMax)
	return roundUp(2*roundUp(rows, lane)+rows*int(j.dimVP), lane)
}

// as views part of a page.
func as[T uint16 | float32 | int8](page []byte, at int64, n int) []T {
	var t T
	_ = page[at : int(at)+n*int(unsafe.Sizeof(t))]
	return unsafe.Slice((*T)(unsafe.Pointer(&page[at])), n)
}
