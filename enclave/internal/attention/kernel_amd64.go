//go:build cgo

package attention

// #cgo noescape kvs_item_avx512
// #cgo nocallback kvs_item_avx512
// #cgo noescape kvs_finish_avx512
// #cgo nocallback kvs_finish_avx512
// #cgo noescape kvs_put_avx512
// #cgo nocallback kvs_put_avx512
// #cgo noescape kvs_item_avx2
// #cgo nocallback kvs_item_avx2
// #cgo noescape kvs_finish_avx2
// #cgo nocallback kvs_finish_avx2
// #cgo noescape kvs_put_avx2
// #cgo nocallback kvs_put_avx2
// #include "kernel.h"
//
// static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
// static int has_avx512(void)
// {
//	return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
//	       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && has_avx2();
// }
import "C"

// kernels returns what this machine runs, the fastest first.
func kernels() []*kernel {
	switch {
	case C.has_avx512() != 0:
		return []*kernel{&avx512, &avx2, &portable}
	case C.has_avx2() != 0:
		return []*kernel{&avx2, &portable}
	}
	return []*kernel{&portable}
}

var avx512 = kernel{
	name: "avx512",
	item: func(j *job, r *run, scratch, part []float32) bool {
		return C.kvs_item_avx512(j.c(), cFloats(r.q), cMask(r), cVis(r), cPages(r.c), cFloats(r.slopes),
			cFloats(scratch), cFloats(part)) == 0
	},
	finish: func(j *job, r *run, parts []float32, splits, stride int) bool {
		return C.kvs_finish_avx512(j.c(), cFloats(parts), C.int64_t(splits), C.int64_t(stride), cFloats(r.params.Sinks),
			cFloats(r.out)) == 0
	},
	put: func(p *place, k, v []float32, page []byte) bool {
		return C.kvs_put_avx512(p.c(), cFloats(k), cFloats(v), cAddress(page)) == 0
	},
}

var avx2 = kernel{
	name: "avx2",
	item: func(j *job, r *run, scratch, part []float32) bool {
		return C.kvs_item_avx2(j.c(), cFloats(r.q), cMask(r), cVis(r), cPages(r.c), cFloats(r.slopes),
			cFloats(scratch), cFloats(part)) == 0
	},
	finish: func(j *job, r *run, parts []float32, splits, stride int) bool {
		return C.kvs_finish_avx2(j.c(), cFloats(parts), C.int64_t(splits), C.int64_t(stride), cFloats(r.params.Sinks),
			cFloats(r.out)) == 0
	},
	put: func(p *place, k, v []float32, page []byte) bool {
		return C.kvs_put_avx2(p.c(), cFloats(k), cFloats(v), cAddress(page)) == 0
	},
}
