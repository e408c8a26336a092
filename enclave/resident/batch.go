package resident

import (
	"fmt"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/attention"
)

// Limits of a batch.
const (
	maxTokens = 1 << 24
	maxMask   = 1 << 30 // bytes
)

// batch is the enclave's own copy of an enclave.Batch: the engine may go on writing to the one it gave.
type batch struct {
	live   bool
	blocks int
	cells  []int64        // of the tokens
	mask   attention.Mask // Data holds all blocks' rows; Rows are those of one block

	// For a layer of so many cells a stream and so many streams, the stream of each block is known.
	fitCells, fitStreams int
	streams              []int
}

var maskTypes = [...]attention.MaskType{enclave.MaskNone: attention.NoMask, enclave.MaskF16: attention.MaskF16, enclave.MaskF32: attention.MaskF32}

func (s *store) Begin(slot int, b *enclave.Batch) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	if slot < 0 || slot >= len(s.slots) {
		return fmt.Errorf("%w: slot %d of %d", enclave.ErrCache, slot, len(s.slots))
	}
	to := &s.slots[slot]
	to.live = false
	size, err := checkBatch(b)
	if err != nil {
		return err
	}
	to.blocks, to.fitCells = b.Blocks, 0
	to.cells = append(to.cells[:0], b.Cells...)
	for i, cell := range to.cells {
		if cell < 0 {
			return fmt.Errorf("%w: token %d belongs to cell %d", enclave.ErrCache, i, cell)
		}
	}
	to.mask = attention.Mask{Type: maskTypes[b.Mask], Cells: b.MaskCells, Rows: b.MaskRows, Data: room(to.mask.Data, size)}
	copy(to.mask.Data, b.MaskData)
	to.live = true
	return nil
}

// checkBatch returns the size of the whole mask in bytes.
func checkBatch(b *enclave.Batch) (int, error) {
	switch {
	case b == nil:
		return 0, fmt.Errorf("%w: no batch", enclave.ErrCache)
	case b.Tokens < 1 || b.Tokens > maxTokens || b.Blocks < 1 || b.Tokens%b.Blocks != 0 || len(b.Cells) != b.Tokens:
		return 0, fmt.Errorf("%w: batch of %d tokens in %d blocks with %d cells", enclave.ErrCache, b.Tokens, b.Blocks, len(b.Cells))
	case b.Mask > enclave.MaskF32 || b.MaskCells < 0 || b.MaskCells > attention.MaxCells:
		return 0, fmt.Errorf("%w: mask of type %d over %d cells", enclave.ErrCache, b.Mask, b.MaskCells)
	case b.Mask == enclave.MaskNone && len(b.MaskData) == 0:
		return 0, nil
	case b.Mask != enclave.MaskNone && (b.MaskRows < b.Tokens/b.Blocks || b.MaskRows > maxTokens):
		return 0, fmt.Errorf("%w: mask of %d rows for %d tokens a block", enclave.ErrCache, b.MaskRows, b.Tokens/b.Blocks)
	}
	// The factors are below 2^26, 2^24 and 2^3, then 2^30 and 2^24: nothing overflows.
	block := int64(b.MaskCells) * int64(b.MaskRows) * int64(elementBytes(b.Mask))
	if block > maxMask || block*int64(b.Blocks) > maxMask || block*int64(b.Blocks) != int64(len(b.MaskData)) {
		return 0, fmt.Errorf("%w: %d bytes for a mask of %d blocks, %d rows, %d cells", enclave.ErrCache, len(b.MaskData), b.Blocks, b.MaskRows, b.MaskCells)
	}
	return len(b.MaskData), nil
}

func elementBytes(m enclave.MaskType) int { return 2 * int(m) } // 2 for F16, 4 for F32

// room returns n bytes, those of b if they are enough and not far too many.
func room(b []byte, n int) []byte {
	const little = 1 << 20
	if cap(b) < n || cap(b) > little && cap(b)/8 > n {
		return make([]byte, n)
	}
	return b[:n]
}

// fit finds the stream of each block in a layer. It remembers the answer: all layers of a graph are alike.
func (b *batch) fit(l *layer) error {
	if b.fitCells == l.cells && b.fitStreams == len(l.streams) {
		return nil
	}
	b.fitCells = 0
	b.streams = b.streams[:0]
	n := len(b.cells) / b.blocks
	for i, cell := range b.cells {
		stream := cell / int64(l.cells)
		if stream >= int64(len(l.streams)) {
			return l.misfit("token %d belongs to cell %d of %d", i, cell, l.total())
		}
		if i%n == 0 {
			b.streams = append(b.streams, int(stream))
		} else if b.streams[i/n] != int(stream) {
			return l.misfit("token %d lies in another stream than its block", i)
		}
	}
	b.fitCells, b.fitStreams = l.cells, len(l.streams)
	return nil
}

// rows returns the mask of n tokens of a block, from its token `first` on.
func (b *batch) rows(block, first, n int) attention.Mask {
	m := b.mask
	if m.Type == attention.NoMask {
		return m
	}
	size := m.Cells * elementBytes(enclave.MaskType(m.Type))
	at := (block*m.Rows + first) * size
	m.Data, m.Rows = m.Data[at:at+n*size], n
	return m
}
