package attention

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// MaskType says what a mask's elements are.
type MaskType int

const (
	NoMask  MaskType = iota // every query sees the cells 0 to Cells-1; Data and Rows are not looked at
	MaskF16                 // binary16, as FLASH_ATTN_EXT takes it
	MaskF32                 // binary32, as SOFT_MAX takes it
)

// Mask is ggml's attention mask of one stream: a row for each token, an element for each cell, added to the logits. -infinity
// hides a cell.
type Mask struct {
	Type  MaskType
	Data  []byte // Rows × Cells elements, little-endian, any alignment
	Cells int    // ne0, padding included
	Rows  int    // ne1; rows past the last token are padding
}

const (
	maxRows = 1 << 24

	hidden16, inf16 = 0xfc00, 0x7c00
	hidden32, inf32 = 0xff800000, 0x7f800000
)

func (m *Mask) elementBytes() int { return int(m.Type) * 2 } // 2 for F16, 4 for F32

func (m *Mask) panels() int { return (m.Cells + panelCells - 1) / panelCells }

func (m *Mask) validate(tokens, cells int) error {
	switch {
	case m.Type < NoMask || m.Type > MaskF32:
		return fmt.Errorf("%w: type %d is neither F16 nor F32", ErrMask, int(m.Type))
	case m.Cells < 0 || m.Cells > MaxCells || m.Type == NoMask && m.Cells > cells:
		return fmt.Errorf("%w: %d cells over a cache of %d", ErrMask, m.Cells, cells)
	case m.Type == NoMask:
		return nil
	case m.Rows < tokens || m.Rows > maxRows:
		return fmt.Errorf("%w: %d rows for %d tokens", ErrMask, m.Rows, tokens)
	case len(m.Data) != m.Rows*m.Cells*m.elementBytes():
		return fmt.Errorf("%w: %d bytes for %d rows of %d cells", ErrMask, len(m.Data), m.Rows, m.Cells)
	}
	return nil
}

// visibility says which cells a query sees: a bit for each cell, a word for each panel, a row for each token.
type visibility struct {
	rows   []uint32
	union  []uint32
	stride int // words between two tokens, 0 if all share one row
	lo, hi int // the panels that anybody sees lie in lo to hi-1
}

// see fills v from the mask, in v's own memory if that is large enough.
func (v *visibility) see(m *Mask, tokens int) error {
	panels, rows := m.panels(), tokens
	v.stride = panels
	if m.Type == NoMask {
		v.stride, rows = 0, 1
	}
	v.rows, v.union = resize(v.rows, rows*panels), resize(v.union, panels)
	clear(v.union)
	rowBytes := m.Cells * m.elementBytes()
	for t := range rows {
		row := v.rows[t*panels : (t+1)*panels]
		switch m.Type {
		case NoMask:
			seeAll(row, m.Cells)
		case MaskF16:
			if !see16(row, m.Data[t*rowBytes:(t+1)*rowBytes]) {
				return fmt.Errorf("%w: NaN or +infinity in row %d", ErrMask, t)
			}
		case MaskF32:
			if !see32(row, m.Data[t*rowBytes:(t+1)*rowBytes]) {
				return fmt.Errorf("%w: NaN or +infinity in row %d", ErrMask, t)
			}
		}
		for i, word := range row {
			v.union[i] |= word
		}
	}
	v.lo, v.hi = bounds(v.union)
	return nil
}

// check compares with what was written.
func (v *visibility) check(written []uint32) error {
	for i, word := range v.union {
		if i < len(written) {
			word &^= written[i]
		}
		if word != 0 {
			return fmt.Errorf("%w: %d", ErrUnwritten, i*panelCells+bits.TrailingZeros32(word))
		}
	}
	return nil
}

func bounds(words []uint32) (lo, hi int) {
	for hi = len(words); hi > 0 && words[hi-1] == 0; hi-- {
	}
	for lo < hi && words[lo] == 0 {
		lo++
	}
	return lo, hi
}

func seeAll(row []uint32, cells int) {
	for i := range row {
		row[i] = ^uint32(0)
		if left := cells - i*panelCells; left < panelCells {
			row[i] = 1<<left - 1
		}
	}
}

// see16 reads a row of F16; false: it holds NaN or +infinity. Most panels are all hidden or all zero, and are seen at a glance.
func see16(row []uint32, data []byte) bool {
	ok := true
	for i := range row {
		part := data[i*panelCells*2:]
		if len(part) >= panelCells*2 {
			if word, uniform := glance(part[:panelCells*2], 0xfc00fc00fc00fc00); uniform {
				row[i] = word
				continue
			}
			part = part[:panelCells*2]
		}
		var word uint32
		for c := 0; c+2 <= len(part); c += 2 {
			h := binary.LittleEndian.Uint16(part[c:])
			if h != hidden16 {
				word |= 1 << (c / 2)
				ok = ok && h&inf16 != inf16
			}
		}
		row[i] = word
	}
	return ok
}

// see32 is see16 for F32.
func see32(row []uint32, data []byte) bool {
	ok := true
	for i := range row {
		part := data[i*panelCells*4:]
		if len(part) >= panelCells*4 {
			if word, uniform := glance(part[:panelCells*4], 0xff800000ff800000); uniform {
				row[i] = word
				continue
			}
			part = part[:panelCells*4]
		}
		var word uint32
		for c := 0; c+4 <= len(part); c += 4 {
			f := binary.LittleEndian.Uint32(part[c:])
			if f != hidden32 {
				word |= 1 << (c / 4)
				ok = ok && f&inf32 != inf32
			}
		}
		row[i] = word
	}
	return ok
}

// glance recognises a panel that is all hidden or all zero.
func glance(part []byte, hidden uint64) (word uint32, uniform bool) {
	first := binary.LittleEndian.Uint64(part)
	if first != 0 && first != hidden {
		return 0, false
	}
	for at := 8; at < len(part); at += 8 {
		if binary.LittleEndian.Uint64(part[at:]) != first {
			return 0, false
		}
	}
	if first == 0 {
		word = ^uint32(0)
	}
	return word, true
}

func resize[T any](s []T, n int) []T {
	if cap(s) < n {
		return make([]T, n)
	}
	return s[:n]
}
