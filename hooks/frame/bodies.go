package frame

import (
	"encoding/binary"
	"math"

	"github.com/kvshield/kvshield/enclave"
)

// The bodies of mode resident, as docs/protocol.md, section 6, lays them out. Decoders take bytes that the peer may still be
// writing: they read every word once.

const (
	declareHead  = 8
	declareEntry = 32
	batchHead    = 48
	attendHead   = 64
	rotateHead   = 64
	keepHead     = 8
	sealHead     = 8
	placeHead    = 16

	// DeclareAnswer is the length of the answer to a Declare.
	DeclareAnswer = 32
	layersMax     = 4096
)

// Operations of Seal and Unseal.
const (
	SealBegin = 0 // answer: the header; of Unseal: takes it
	SealText  = 1
	SealCells = 2
	SealEnd   = 3

	UnsealBegin = 0
	UnsealCheck = 1
	UnsealPlace = 2
)

type words []byte

func (w words) u32(i int) uint32  { return binary.LittleEndian.Uint32(w[4*i:]) }
func (w words) num(i int) int     { return int(w.u32(i)) }
func (w words) f32(i int) float32 { return math.Float32frombits(w.u32(i)) }

// head copies the fixed part of a body.
func head(body []byte, n int) (words, []byte, error) {
	if len(body) < n {
		return nil, nil, malformed("a body of %d bytes where at least %d are needed", len(body), n)
	}
	return append(words(nil), body[:n]...), body[n:], nil
}

// DecodeDeclare reads the body of a Declare.
func DecodeDeclare(body []byte) ([]enclave.LayerCache, error) {
	h, rest, err := head(body, declareHead)
	if err != nil {
		return nil, err
	}
	n := h.num(0)
	if n < 1 || n > layersMax || len(rest) != n*declareEntry {
		return nil, malformed("%d layers in %d bytes", n, len(rest))
	}
	list := make([]enclave.LayerCache, n)
	for i := range list {
		w := append(words(nil), rest[i*declareEntry:][:declareEntry]...)
		list[i] = enclave.LayerCache{Layer: w.num(0), QueryHeads: w.num(1), KVHeads: w.num(2), DimK: w.num(3), DimV: w.num(4),
			Cells: w.num(5), Streams: w.num(6), Storage: enclave.Storage(w.u32(7))}
	}
	return list, nil
}

// EncodeDeclared writes the answer to a Declare: whether it was refused, the first number, and the figures.
func EncodeDeclared(dst []byte, r enclave.Reservation, refused bool) {
	_ = dst[DeclareAnswer-1]
	le := binary.LittleEndian
	status := uint32(0)
	if refused {
		status = 1
	}
	le.PutUint32(dst[0:], status)
	le.PutUint32(dst[4:], uint32(r.First))
	le.PutUint64(dst[8:], uint64(r.Need))
	le.PutUint64(dst[16:], uint64(r.Reserved))
	le.PutUint64(dst[24:], uint64(r.Limit))
}

// DecodeCopy reads the body of a Copy: from which stream to which.
func DecodeCopy(body []byte) (from, to int, err error) {
	h, rest, err := head(body, 8)
	if err != nil || len(rest) != 0 {
		return 0, 0, malformed("a copy of %d bytes", len(body))
	}
	return h.num(0), h.num(1), nil
}

// BatchPart is a piece of a batch, which may be too long for one frame.
type BatchPart struct {
	Batch         enclave.Batch // without cells and mask
	Total, Offset int64         // bytes of both together; where Data belongs
	Data          []byte
}

// BatchMax is the most bytes of cells and mask together.
const BatchMax = 1 << 30

// DecodeBatch reads the body of a Batch.
func DecodeBatch(body []byte) (BatchPart, error) {
	h, rest, err := head(body, batchHead)
	if err != nil {
		return BatchPart{}, err
	}
	p := BatchPart{Data: rest, Total: int64(binary.LittleEndian.Uint64(h[24:])), Offset: int64(binary.LittleEndian.Uint64(h[32:]))}
	b := enclave.Batch{Mask: enclave.MaskType(h.u32(0)), Tokens: h.num(1), Blocks: h.num(2), MaskCells: h.num(3), MaskRows: h.num(4)}
	p.Batch = b
	size := uint64(0) // of an element
	switch b.Mask {
	case enclave.MaskNone:
	case enclave.MaskF16:
		size = 2
	case enclave.MaskF32:
		size = 4
	default:
		return BatchPart{}, malformed("mask type %d", b.Mask)
	}
	const most = 1 << 30
	row := size * uint64(b.MaskCells)
	if b.Tokens < 1 || b.Blocks < 1 || b.Blocks > b.Tokens || b.Tokens > most/8 || row > most || (row > 0 && uint64(b.MaskRows) > most/row) {
		return BatchPart{}, malformed("%d tokens in %d blocks, a mask of %d × %d", b.Tokens, b.Blocks, b.MaskRows, b.MaskCells)
	}
	block := row * uint64(b.MaskRows)
	if block > 0 && uint64(b.Blocks) > most/block {
		return BatchPart{}, malformed("a mask of %d × %d × %d", b.Blocks, b.MaskRows, b.MaskCells)
	}
	total := 8*int64(b.Tokens) + int64(block)*int64(b.Blocks)
	if p.Total != total || total > BatchMax || p.Offset < 0 || p.Offset > total || int64(len(rest)) > total-p.Offset || len(rest) == 0 {
		return BatchPart{}, malformed("%d bytes at %d of a batch that has %d, not %d", len(rest), p.Offset, total, p.Total)
	}
	return p, nil
}

// Fill completes a batch from the bytes of all its parts.
func (p BatchPart) Fill(data []byte) *enclave.Batch {
	b := p.Batch
	b.Cells = make([]int64, b.Tokens)
	for i := range b.Cells {
		b.Cells[i] = int64(binary.LittleEndian.Uint64(data[8*i:]))
	}
	b.MaskData = data[8*b.Tokens:]
	return &b
}

// DecodeAttend reads the body of an Attend. Keys, values and queries stay where they are; outFloats is the room that the answer needs.
func DecodeAttend(body []byte, floats func([]byte) []float32) (a enclave.Attention, outFloats int, err error) {
	h, rest, err := head(body, attendHead)
	if err != nil {
		return a, 0, err
	}
	a = enclave.Attention{Slot: h.num(0), PutFirst: h.num(1), PutCount: h.num(2), QueryFirst: h.num(3), QueryCount: h.num(4),
		Scale: h.f32(5), MaxBias: h.f32(6), LogitSoftcap: h.f32(7)}
	sinks, k, v, q, o := h.num(8), h.num(9), h.num(10), h.num(11), h.num(12)
	const most = 1 << 28
	for _, n := range []int{a.PutCount, a.QueryCount, sinks, k, v, q, o} {
		if n > most {
			return a, 0, malformed("a count of %d", n)
		}
	}
	counts := []uint64{uint64(a.PutCount) * uint64(k), uint64(a.PutCount) * uint64(v), uint64(a.QueryCount) * uint64(q), uint64(sinks)}
	total := uint64(0)
	for _, n := range counts {
		total += n
	}
	if out := uint64(a.QueryCount) * uint64(o); total*4 != uint64(len(rest)) || out > most {
		return a, 0, malformed("%d bytes of keys, values and queries where %d floats are announced", len(rest), total)
	}
	list := floats(rest)
	parts := make([][]float32, len(counts))
	for i, n := range counts {
		parts[i], list = list[:n:n], list[n:]
	}
	a.K, a.V, a.Q, a.Sinks = parts[0], parts[1], parts[2], parts[3]
	if sinks == 0 {
		a.Sinks = nil
	}
	return a, a.QueryCount * o, nil
}

// DecodeRotate reads the body of a Rotate.
func DecodeRotate(body []byte) (*enclave.Rotation, error) {
	h, rest, err := head(body, rotateHead)
	if err != nil {
		return nil, err
	}
	n, factors := h.num(1), h.num(11)
	if n > layersMax<<16 || factors > layersMax || len(rest) != 4*(n+factors) {
		return nil, malformed("%d shifts and %d factors in %d bytes", n, factors, len(rest))
	}
	r := &enclave.Rotation{First: h.num(0), From: h.num(13), Dims: h.num(2), Mode: int32(h.u32(3)), ContextOrig: int32(h.u32(4)),
		Base: h.f32(5), Scale: h.f32(6), ExtFactor: h.f32(7), AttnFactor: h.f32(8), BetaFast: h.f32(9), BetaSlow: h.f32(10), Hadamard: h.num(12)}
	w := append(words(nil), rest...)
	r.Shift = make([]int32, n)
	for i := range r.Shift {
		r.Shift[i] = int32(w.u32(i))
	}
	for i := range factors {
		r.Factors = append(r.Factors, w.f32(n+i))
	}
	return r, nil
}

// DecodeKeep reads the body of a Keep: the first cell, their number, a bit for each.
func DecodeKeep(body []byte) (first, n int, keep []uint32, err error) {
	h, rest, err := head(body, keepHead)
	if err != nil {
		return 0, 0, nil, err
	}
	first, n = h.num(0), h.num(1)
	if len(rest) != (n+31)/32*4 {
		return 0, 0, nil, malformed("%d cells in %d bytes", n, len(rest))
	}
	w := append(words(nil), rest...)
	keep = make([]uint32, len(rest)/4)
	for i := range keep {
		keep[i] = w.u32(i)
	}
	return first, n, keep, nil
}

// DecodeSeal reads the head of a Seal or Unseal: its operation, and what follows.
func DecodeSeal(body []byte) (op int, rest []byte, err error) {
	h, rest, err := head(body, sealHead)
	if err != nil {
		return 0, nil, err
	}
	return h.num(0), rest, nil
}

// DecodeCells reads cell numbers.
func DecodeCells(b []byte) ([]int64, error) {
	if len(b)%8 != 0 {
		return nil, malformed("cell numbers in %d bytes", len(b))
	}
	list := make([]int64, len(b)/8)
	for i := range list {
		list[i] = int64(binary.LittleEndian.Uint64(b[8*i:]))
	}
	return list, nil
}

// DecodePlace reads the body of an UnsealPlace behind its operation.
func DecodePlace(rest []byte) (number int, cells []int64, record []byte, err error) {
	h, rest, err := head(rest, placeHead-sealHead)
	if err != nil {
		return 0, nil, nil, err
	}
	n := h.num(1)
	if n > len(rest)/8 {
		return 0, nil, nil, malformed("%d cells in %d bytes", n, len(rest))
	}
	if cells, err = DecodeCells(rest[:8*n]); err != nil {
		return 0, nil, nil, err
	}
	return h.num(0), cells, rest[8*n:], nil
}
