package secmem

import "unsafe"

// Uint16s returns the region as 16-bit words in the machine's byte order. An odd byte at the end
// is left out. It panics after Wipe.
func (r *Region) Uint16s() []uint16 { return view[uint16](r.Bytes()) }

// Uint32s is Uint16s with 32-bit words; up to three bytes at the end are left out.
func (r *Region) Uint32s() []uint32 { return view[uint32](r.Bytes()) }

func view[T uint16 | uint32](b []byte) []T {
	var word T
	size := unsafe.Sizeof(word)
	first := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(first)%size != 0 {
		panic("secmem: memory is not aligned for this view")
	}
	return unsafe.Slice((*T)(first), uintptr(len(b))/size)
}
