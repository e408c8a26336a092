//go:build cgo

#include "kernel.h"

#include <arm_neon.h>

#define LEVEL neon
#define TARGET
#define VECTOR_BYTES 16
#define DOT_ROWS 4
#define DOT_VECTORS 4
#define MIX_ROWS 4
#define MIX_VECTORS 4

// The four bytes are copied: a panel's row of eight may end with the memory it lies in.
static inline float32x4_t from_int8(const int8_t *p)
{
	uint32_t four;
	__builtin_memcpy(&four, p, sizeof four);
	int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
	return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

#define LOAD_HALF(p) ((vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p)))))
#define STORE_HALF(p, x) vst1_u16((uint16_t *)(p), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)(x))))
#define LOAD_INT8(p) ((vf)from_int8((const int8_t *)(p)))
#define VMAX(a, b) ((vf)vmaxq_f32((float32x4_t)(a), (float32x4_t)(b)))

#include "block.h"
