package attention

import (
	"fmt"
	"slices"
	"sync"
	"unsafe"

	"github.com/kvshield/kvshield/enclave/internal/secmem"
)

// Cache is the keys and values of one layer of one stream, by cell. It grows by pages of 256 cells as cells are written. It may be
// used by several goroutines; Put and Clear wait for a running Attend.
type Cache struct {
	shape  Shape
	cells  int
	kernel *kernel

	mu      sync.RWMutex
	pages   []*page
	table   []uintptr // the address of each page, 0 where there is none: outside the Go heap, so it does not move
	written []uint32  // a bit for each cell, a word for each panel
	at      place     // of the cell that Put writes: here because the kernel's argument would be an allocation otherwise
	closed  bool
}

type page struct {
	region *secmem.Region
	mem    []byte
}

// NewCache returns an empty cache for cells 0 to cells-1. It takes next to no memory before the first Put.
func NewCache(s Shape, cells int) (*Cache, error) { return newCache(s, cells, best()) }

func newCache(s Shape, cells int, k *kernel) (*Cache, error) {
	if err := s.fits(cells); err != nil {
		return nil, err
	}
	return &Cache{shape: s, cells: cells, kernel: k}, nil
}

func (s Shape) fits(cells int) error {
	if err := s.validate(); err != nil {
		return err
	}
	if cells < 1 || cells > MaxCells {
		return fmt.Errorf("%w: %d cells: from 1 to %d", ErrShape, cells, MaxCells)
	}
	if s.pageBytes() > secmem.MaxSize {
		return fmt.Errorf("%w: 256 cells take %d bytes, more than %d", ErrShape, s.pageBytes(), secmem.MaxSize)
	}
	return nil
}

// Shape returns what the cache was made for.
func (c *Cache) Shape() Shape { return c.shape }

// Cells returns the cache's maximum of cells.
func (c *Cache) Cells() int { return c.cells }

// Put stores a cell: k has KVHeads × DimK floats, v KVHeads × DimV. Numbers that are not finite, or not in the storage, are
// ErrNotFinite; the cell is unwritten then.
func (c *Cache) Put(cell int64, k, v []float32) error {
	if err := c.checkCell(cell, k, v); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	p, err := c.page(int(cell / pageCells))
	if err != nil {
		return err
	}
	c.at = c.shape.at(cell % pageCells)
	panel, bit := cell/panelCells, uint32(1)<<(cell%panelCells)
	if !c.kernel.put(&c.at, k, v, p.mem) {
		zeros := make([]float32, max(len(k), len(v)))
		c.kernel.put(&c.at, zeros[:len(k)], zeros[:len(v)], p.mem)
		c.written[panel] &^= bit
		return fmt.Errorf("%w: cell %d as %v", ErrNotFinite, cell, c.shape.Type)
	}
	c.written[panel] |= bit
	return nil
}

// Get reads a cell back, as it was rounded: for an engine that rewrites its keys (a context shift) or moves cells.
func (c *Cache) Get(cell int64, k, v []float32) error {
	if err := c.checkCell(cell, k, v); err != nil {
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
	at.get(c.pages[cell/pageCells].mem, k, v)
	return nil
}

// Clear zeroes and gives back all memory; the cache is empty and can be filled again.
func (c *Cache) Clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wipe()
}

// Close is Clear for good. It may be called again.
func (c *Cache) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wipe()
	c.closed = true
}

// Bytes returns the secret memory in use.
func (c *Cache) Bytes() int64 {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var n int64
	for _, p := range c.pages {
		if p != nil {
			n += int64(len(p.mem))
		}
	}
	return n
}

// Kinds returns how the kernel keeps the pages: each of secmem's kinds and the bytes of that kind.
func (c *Cache) Kinds() map[string]int64 {
	c.mu.RLock()
	defer c.mu.RUnlock()
	kinds := map[string]int64{}
	for _, p := range c.pages {
		if p != nil {
			kinds[p.region.Kind()] += int64(len(p.mem))
		}
	}
	return kinds
}

func (c *Cache) wipe() {
	for _, p := range c.pages {
		if p != nil {
			p.region.Wipe()
		}
	}
	c.pages, c.table, c.written = nil, nil, nil
}

// page returns page i, which it makes if there is none. The caller holds the lock.
func (c *Cache) page(i int) (*page, error) {
	if i < len(c.pages) && c.pages[i] != nil {
		return c.pages[i], nil
	}
	region, err := secmem.New(c.shape.pageBytes())
	if err != nil {
		return nil, fmt.Errorf("no memory for keys and values: %w", err)
	}
	if more := i + 1 - len(c.pages); more > 0 {
		c.pages = append(c.pages, slices.Repeat([]*page{nil}, more)...)
		c.table = append(c.table, make([]uintptr, more)...)
		c.written = append(c.written, make([]uint32, more*pagePanels)...)
	}
	p := &page{region: region, mem: region.Bytes()}
	c.pages[i], c.table[i] = p, uintptr(unsafe.Pointer(unsafe.SliceData(p.mem)))
	return p, nil
}

func (c *Cache) has(cell int64) bool {
	panel := cell / panelCells
	return panel < int64(len(c.written)) && c.written[panel]>>(cell%panelCells)&1 != 0
}

func (c *Cache) checkCell(cell int64, k, v []float32) error {
	s := c.shape
	switch {
	case cell < 0 || cell >= int64(c.cells):
		return fmt.Errorf("%w: %d of %d", ErrCell, cell, c.cells)
	case len(k) != s.KVHeads*s.DimK || len(v) != s.KVHeads*s.DimV:
		return fmt.Errorf("%w: key of %d and value of %d floats, want %d and %d",
			ErrLength, len(k), len(v), s.KVHeads*s.DimK, s.KVHeads*s.DimV)
	}
	return nil
}
