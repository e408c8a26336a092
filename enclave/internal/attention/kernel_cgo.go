//go:build cgo && (amd64 || arm64)

package attention

// #cgo CFLAGS: -O3 -std=gnu11 -Wall -Wextra -Wshadow -Wstrict-prototypes -Wwrite-strings -Werror
// #include "kernel.h"
import "C"

import "unsafe"

// The twins of kernel.h have to agree in size.
var (
	_ [unsafe.Sizeof(job{})]byte   = [C.sizeof_struct_kvs_job]byte{}
	_ [unsafe.Sizeof(place{})]byte = [C.sizeof_struct_kvs_cell]byte{}
)

func (j *job) c() *C.struct_kvs_job { return (*C.struct_kvs_job)(unsafe.Pointer(j)) }

func (p *place) c() *C.struct_kvs_cell { return (*C.struct_kvs_cell)(unsafe.Pointer(p)) }

func cFloats(s []float32) *C.float { return (*C.float)(unsafe.SliceData(s)) }

func cMask(r *run) *C.uint8_t { return (*C.uint8_t)(unsafe.SliceData(r.mask.Data)) }

func cVis(r *run) *C.uint32_t { return (*C.uint32_t)(unsafe.SliceData(r.vis.rows)) }

func cPages(c *Cache) *C.uintptr_t { return (*C.uintptr_t)(unsafe.Pointer(unsafe.SliceData(c.table))) }

func cAddress(page []byte) C.uintptr_t {
	return C.uintptr_t(uintptr(unsafe.Pointer(unsafe.SliceData(page))))
}
