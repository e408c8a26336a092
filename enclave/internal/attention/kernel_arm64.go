//go:build cgo

package attention

// #cgo noescape kvs_item_neon
// #cgo nocallback kvs_item_neon
// #cgo noescape kvs_finish_neon
// #cgo nocallback kvs_finish_neon
// #cgo noescape kvs_put_neon
// #cgo nocallback kvs_put_neon
// #include "kernel.h"
import "C"

// kernels returns what this machine runs, the fastest first. Every arm64 has NEON and its conversions.
func kernels() []*kernel { return []*kernel{&neon, &portable} }

var neon = kernel{
	name: "neon",
	item: func(j *job, r *run, scratch, part []float32) bool {
		return C.kvs_item_neon(j.c(), cFloats(r.q), cMask(r), cVis(r), cPages(r.c), cFloats(r.slopes),
			cFloats(scratch), cFloats(part)) == 0
	},
	finish: func(j *job, r *run, parts []float32, splits, stride int) bool {
		return C.kvs_finish_neon(j.c(), cFloats(parts), C.int64_t(splits), C.int64_t(stride), cFloats(r.params.Sinks),
			cFloats(r.out)) == 0
	},
	put: func(p *place, k, v []float32, page []byte) bool {
		return C.kvs_put_neon(p.c(), cFloats(k), cFloats(v), cAddress(page)) == 0
	},
}
