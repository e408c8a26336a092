package attention

import (
	"fmt"
	"math/bits"
	"os"
)

// Reserve returns the bytes that a cache takes when all of its cells are written: whole pages of 256 cells, each in whole pages of
// the machine.
func Reserve(s Shape, cells int) (int64, error) {
	if err := s.fits(cells); err != nil {
		return 0, err
	}
	pages := roundUp(cells, pageCells) / pageCells
	return int64(pages) * int64(roundUp(s.pageBytes(), os.Getpagesize())), nil
}

// Written says whether a cell holds keys and values. A cell outside the cache does not.
func (c *Cache) Written(cell int64) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return cell >= 0 && c.has(cell)
}

// Keep wipes those of the n cells from first on whose bit in keep is not set: bit i%32 of keep[i/32] is that of cell first+i.
// Pages without a written cell are given back. Every word of keep is read once.
func (c *Cache) Keep(first, n int64, keep []uint32) error {
	switch {
	case first < 0 || n < 0 || first > int64(c.cells)-n:
		return fmt.Errorf("%w: %d cells from %d of %d", ErrCell, n, first, c.cells)
	case int64(len(keep)) != (n+31)/32:
		return fmt.Errorf("%w: %d words for %d cells", ErrLength, len(keep), n)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	for word, kept := range keep {
		cell := first + int64(word)*32
		many := min(32, first+n-cell)
		for gone := ^kept & (1<<many - 1); gone != 0; gone &= gone - 1 {
			c.forget(cell + int64(bits.TrailingZeros32(gone)))
		}
	}
	c.drop(first, n)
	return nil
}

// forget zeroes a cell. The caller holds the lock.
func (c *Cache) forget(cell int64) {
	if !c.has(cell) {
		return
	}
	p := c.shape.at(cell % pageCells)
	p.wipe(c.pages[cell/pageCells].mem)
	c.written[cell/panelCells] &^= 1 << (cell % panelCells)
}

// drop gives back the pages among n cells from first on that hold nothing. The caller holds the lock.
func (c *Cache) drop(first, n int64) {
	for i := first / pageCells; i < int64(len(c.pages)) && i*pageCells < first+n; i++ {
		if c.pages[i] != nil && c.empty(i) {
			c.pages[i].region.Wipe()
			c.pages[i], c.table[i] = nil, 0
		}
	}
}

func (c *Cache) empty(page int64) bool {
	var any uint32
	for _, word := range c.written[page*pagePanels:][:pagePanels] {
		any |= word
	}
	return any == 0
}

// CopyFrom makes c's cells exactly those of another cache of the same shape and as many cells; after an error c is empty. Two
// caches must not be copied in both directions at the same time.
func (c *Cache) CopyFrom(from *Cache) error {
	if c == from {
		return nil
	}
	if c.shape != from.shape || c.cells != from.cells {
		return fmt.Errorf("%w: a copy between caches that differ", ErrShape)
	}
	from.mu.RLock()
	defer from.mu.RUnlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || from.closed {
		return ErrClosed
	}
	c.wipe()
	for i, p := range from.pages {
		if p == nil {
			continue
		}
		to, err := c.page(i)
		if err != nil {
			c.wipe()
			return err
		}
		copy(to.mem, p.mem)
		copy(c.written[i*pagePanels:][:pagePanels], from.written[i*pagePanels:][:pagePanels])
	}
	return nil
}

// Keys reads a cell's keys, KVHeads × DimK floats, as they were rounded.
func (c *Cache) Keys(cell int64, k []float32) error {
	if err := c.checkKeys(cell, k); err != nil {
		return err
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	switch {
	case c.closed:
		return ErrClosed
	case !c.has(cell):
		return fmt.Errorf("%w: %d", ErrUnwritten, cell)
	}
	at := c.shape.at(cell % pageCells)
	for h := range c.shape.KVHeads {
		at.read(c.pages[cell/pageCells].mem, int64(h), k[h*c.shape.DimK:][:c.shape.DimK], nil)
	}
	return nil
}

// PutKeys replaces the keys of a written cell and leaves its values. After ErrNotFinite the cell is unwritten.
func (c *Cache) PutKeys(cell int64, k []float32) error {
	if err := c.checkKeys(cell, k); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return ErrClosed
	case !c.has(cell):
		return fmt.Errorf("%w: %d", ErrUnwritten, cell)
	}
	at := c.shape.at(cell % pageCells)
	ok := true
	for h := range c.shape.KVHeads {
		ok = at.write(c.pages[cell/pageCells].mem, int64(h), k[h*c.shape.DimK:][:c.shape.DimK], nil) && ok
	}
	if !ok {
		c.forget(cell)
		return fmt.Errorf("%w: cell %d as %v", ErrNotFinite, cell, c.shape.Type)
	}
	return nil
}

func (c *Cache) checkKeys(cell int64, k []float32) error {
	switch s := c.shape; {
	case cell < 0 || cell >= int64(c.cells):
		return fmt.Errorf("%w: %d of %d", ErrCell, cell, c.cells)
	case len(k) != s.KVHeads*s.DimK:
		return fmt.Errorf("%w: key of %d floats, want %d", ErrLength, len(k), s.KVHeads*s.DimK)
	}
	return nil
}

// CellBytes is the length of an exported cell.
func (s Shape) CellBytes() int {
	n := 0
	p := s.at(0)
	for _, r := range p.rows(0) {
		n += r.n * r.size
	}
	return n * s.KVHeads
}

// Export writes a cell to raw, CellBytes long, bit by bit as it is stored: for each head the key's elements, the value's, and in
// Q8_0 the scales of both.
func (c *Cache) Export(cell int64, raw []byte) error {
	if err := c.checkRaw(cell, raw); err != nil {
		return err
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	switch {
	case c.closed:
		return ErrClosed
	case !c.has(cell):
		return fmt.Errorf("%w: %d", ErrUnwritten, cell)
	}
	p := c.shape.at(cell % pageCells)
	p.export(c.pages[cell/pageCells].mem, raw)
	return nil
}

// Import stores what Export wrote. The bytes are taken as they are: they must come from Export.
func (c *Cache) Import(cell int64, raw []byte) error {
	if err := c.checkRaw(cell, raw); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	to, err := c.page(int(cell / pageCells))
	if err != nil {
		return err
	}
	p := c.shape.at(cell % pageCells)
	p.restore(to.mem, raw)
	c.written[cell/panelCells] |= 1 << (cell % panelCells)
	return nil
}

func (c *Cache) checkRaw(cell int64, raw []byte) error {
	switch {
	case cell < 0 || cell >= int64(c.cells):
		return fmt.Errorf("%w: %d of %d", ErrCell, cell, c.cells)
	case len(raw) != c.shape.CellBytes():
		return fmt.Errorf("%w: cell of %d bytes, want %d", ErrLength, len(raw), c.shape.CellBytes())
	}
	return nil
}
