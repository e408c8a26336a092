//go:build cgo

#include "kernel.h"

#include <immintrin.h>

#define LEVEL avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define VECTOR_BYTES 64
#define DOT_ROWS 8
#define DOT_VECTORS 2
#define MIX_ROWS 4
#define MIX_VECTORS 4

#define LOAD_HALF(p) ((vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(p))))
#define STORE_HALF(p, x) \
	_mm256_storeu_si256((__m256i *)(void *)(p), _mm512_cvtps_ph((__m512)(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#define LOAD_INT8(p) ((vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p)))))
#define VMAX(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))

#include "block.h"
