//go:build cgo

#include "kernel.h"

#include <immintrin.h>

#define LEVEL avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VECTOR_BYTES 32
#define DOT_ROWS 4
#define DOT_VECTORS 2
#define MIX_ROWS 4
#define MIX_VECTORS 2

#define LOAD_HALF(p) ((vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p))))
#define STORE_HALF(p, x) \
	_mm_storeu_si128((__m128i *)(void *)(p), _mm256_cvtps_ph((__m256)(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#define LOAD_INT8(p) ((vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p)))))
#define VMAX(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))

#include "block.h"
