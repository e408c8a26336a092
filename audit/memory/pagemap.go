package memory

import (
	"encoding/binary"
	"io"
)

// source is memory to search. absent, unless nil, says that a stretch of a sparse span was never written to.
type source struct {
	io.ReaderAt
	absent func(start, end uint64, scratch []byte) bool
}

// pagemap answers from /proc/PID/pagemap (the kernel's Documentation/admin-guide/mm/pagemap.rst): 64 bits for each page, bit 63 for one
// in memory and bit 62 for one swapped out or kept by a device. Anonymous memory that has neither was never touched:
// race detectors, arenas and devices' address spaces reserve a great deal of it. Reading it would make the kernel fill the
// process's page tables, or wait for a userfaultfd handler.
type pagemap struct {
	io.ReaderAt
	page uint64
}

const inUse = 3 << 62

func (p pagemap) absent(start, end uint64, scratch []byte) bool {
	first, last := start/p.page, (end-1)/p.page
	entries := scratch[:min(uint64(len(scratch)), (last-first+1)*8)]
	if n, _ := p.ReadAt(entries, int64(first*8)); n < len(entries) || uint64(n) < (last-first+1)*8 {
		return false
	}
	for ; len(entries) > 0; entries = entries[8:] {
		if binary.LittleEndian.Uint64(entries)&inUse != 0 {
			return false
		}
	}
	return true
}
