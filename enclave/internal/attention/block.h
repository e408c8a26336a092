// The kernel, written once over a vector type and compiled once for each SIMD level: the level's file defines LEVEL, TARGET,
// VECTOR_BYTES, the register tiles and how to load F16 and 8-bit integers, and then includes this.
//
// Keys lie interleaved, [panel][dimension][32 cells]: one vector holds a dimension of many cells, so that the dot products of
// many cells grow side by side and nothing has to be summed across a vector. Values lie cell by cell.
//
// NaN and infinity are let through everywhere (comparisons are written so that NaN survives), and found in kvs_finish.
#include <float.h>
#include <math.h>
#include <string.h>

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(f) JOIN(f, LEVEL)
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef float vfu __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(1)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES), may_alias));

enum { VL = VECTOR_BYTES / 4 };

INLINE vf load(const void *p) { return *(const vfu *)p; }
INLINE void store(void *p, vf x) { *(vfu *)p = x; }
INLINE vf splat(float x) { return x - (vf){0}; }

// load_as loads stored elements; those of Q8_0 still lack their scale.
INLINE vf load_as(const void *at, int64_t i, const int kind)
{
	switch (kind) {
	case KVS_F16: return LOAD_HALF((const uint16_t *)at + i);
	case KVS_F32: return load((const float *)at + i);
	default: return LOAD_INT8((const int8_t *)at + i);
	}
}

// ahead is memory that is wanted soon: one thread's arithmetic alone does not keep enough reads under way, and the
// processor's own look-ahead ends at each 4 KiB. `lines` cache lines are asked for at each step.
struct ahead {
	const char *at;
	int64_t lines;
};

INLINE void look(const struct ahead *a, int64_t step)
{
	for (int64_t i = 0; i < a->lines; i++) __builtin_prefetch(a->at + (step * a->lines + i) * 64);
}

static inline struct ahead ahead_of(const void *at, int64_t bytes, int64_t steps)
{
	return (struct ahead){.at = at, .lines = at ? (bytes / 64 + steps - 1) / steps : 0};
}

INLINE float vsum(vf x)
{
	float s = 0;
	UNROLL for (int i = 0; i < VL; i++) s += x[i];
	return s;
}

INLINE float vmax(vf x)
{
	float m = x[0];
	UNROLL for (int i = 1; i < VL; i++) m = x[i] > m ? x[i] : m;
	return m;
}

// vexp is e^x for x <= 88, within 2 units in the last place; below -87.3 (and for -inf) it is 0. Cody and Waite: 2^n times a
// polynomial in r = x - n·ln 2, whose coefficients are the Taylor series' with the last ones fitted to |r| <= ln 2 / 2.
INLINE vf vexp(vf x)
{
	const float lowest = -87.3f, round = 12582912.0f; // 1.5 · 2^23: adding it rounds to a whole number
	vi under = (vi)(x < splat(lowest));
	vf y = VMAX(splat(lowest), x);
	vf t = y * 1.44269504f + round;
	vf n = t - round;
	vf r = y - n * 0.693145752f;
	r = r - n * 1.42860677e-6f;
	vf p = splat(1.98756916e-4f);
	p = p * r + 1.39819994e-3f;
	p = p * r + 8.33345205e-3f;
	p = p * r + 4.16657962e-2f;
	p = p * r + 1.66666657e-1f;
	p = p * r + 0.5f;
	p = p * (r * r) + (r + 1.0f);
	vf pow2 = (vf)(((vi)t << 23) + 0x3f800000);
	return (vf)((vi)(p * pow2) & ~under);
}

// vtanh has an absolute error of about 1e-7, which is what a logit needs.
INLINE vf vtanh(vf x)
{
	vf limited = VMAX(splat(-10.0f), -VMAX(splat(-10.0f), -x));
	return 1.0f - 2.0f / (vexp(limited * 2.0f) + 1.0f);
}

static TARGET float exp1(float x) { return vexp(splat(x))[0]; }

// keys is a panel of keys, and what to fetch while it is worked on.
struct keys {
	const void *at;
	const uint16_t *scales; // of Q8_0
	struct ahead ahead;
};

// dot_tile multiplies `rows` queries with a panel of keys.
INLINE void dot_tile(const float *q, int64_t dim, const struct keys *k, const int kind, float *p, int64_t stride, const int rows)
{
	const int64_t step = kind == KVS_Q8_0 ? 32 : KVS_MAX_DIM;
	for (int c = 0; c < KVS_PANEL; c += DOT_VECTORS * VL) {
		struct ahead ahead = c == 0 ? k->ahead : (struct ahead){0};
		vf acc[DOT_ROWS][DOT_VECTORS], scale[DOT_VECTORS];
		UNROLL for (int r = 0; r < rows; r++)
			UNROLL for (int n = 0; n < DOT_VECTORS; n++) acc[r][n] = splat(0);
		for (int64_t d = 0; d < dim;) {
			int64_t end = d + step < dim ? d + step : dim;
			if (kind == KVS_Q8_0)
				UNROLL for (int n = 0; n < DOT_VECTORS; n++)
					scale[n] = LOAD_HALF(k->scales + d / 32 * KVS_PANEL + c + n * VL);
			for (; d < end; d++) {
				vf key[DOT_VECTORS];
				look(&ahead, d);
				UNROLL for (int n = 0; n < DOT_VECTORS; n++) {
					key[n] = load_as(k->at, d * KVS_PANEL + c + n * VL, kind);
					if (kind == KVS_Q8_0) key[n] *= scale[n];
				}
				UNROLL for (int r = 0; r < rows; r++)
					UNROLL for (int n = 0; n < DOT_VECTORS; n++) acc[r][n] += key[n] * q[r * dim + d];
			}
		}
		UNROLL for (int r = 0; r < rows; r++)
			UNROLL for (int n = 0; n < DOT_VECTORS; n++) store(p + r * stride + c + n * VL, acc[r][n]);
	}
}

INLINE void dot_as(const float *q, int64_t dim, struct keys k, const int kind, float *p, int64_t stride, int64_t rows)
{
	int64_t r = 0;
	for (; r + DOT_ROWS <= rows; r += DOT_ROWS, k.ahead.lines = 0)
		dot_tile(q + r * dim, dim, &k, kind, p + r * stride, stride, DOT_ROWS);
	for (; DOT_ROWS > 4 && r + 4 <= rows; r += 4, k.ahead.lines = 0)
		dot_tile(q + r * dim, dim, &k, kind, p + r * stride, stride, 4);
	for (; r + 2 <= rows; r += 2, k.ahead.lines = 0) dot_tile(q + r * dim, dim, &k, kind, p + r * stride, stride, 2);
	for (; r < rows; r++, k.ahead.lines = 0) dot_tile(q + r * dim, dim, &k, kind, p + r * stride, stride, 1);
}

static TARGET void dot(const float *q, int64_t dim, const struct keys *k, int kind, float *p, int64_t stride, int64_t rows)
{
	switch (kind) {
	case KVS_F16: dot_as(q, dim, *k, KVS_F16, p, stride, rows); break;
	case KVS_F32: dot_as(q, dim, *k, KVS_F32, p, stride, rows); break;
	default: dot_as(q, dim, *k, KVS_Q8_0, p, stride, rows);
	}
}

// mix is one block's part of the output: o = o·keep + p·v, for rows of `dim` floats.
struct mix {
	const void *v[KVS_BLOCK]; // a panel's values each
	struct ahead ahead[KVS_BLOCK];
	const float *scales; // of Q8_0: `blocks` for each cell, panel after panel
	int64_t panels, dim, stride, blocks;
	const float *p, *keep;
	float *o;
};

INLINE void mix_tile(const struct mix *m, const int kind, int64_t row, int64_t at, const int rows, const int vectors)
{
	vf acc[MIX_ROWS][MIX_VECTORS];
	float *o = m->o + row * m->dim + at;
	UNROLL for (int r = 0; r < rows; r++)
		UNROLL for (int n = 0; n < vectors; n++) acc[r][n] = load(o + r * m->dim + n * VL) * m->keep[row + r];
	for (int64_t j = 0; j < m->panels; j++) {
		const float *p = m->p + row * m->stride + j * KVS_PANEL, *scales = m->scales + j * KVS_PANEL * m->blocks;
		struct ahead ahead = row + at == 0 ? m->ahead[j] : (struct ahead){0};
		for (int64_t c = 0; c < KVS_PANEL; c++) {
			vf value[MIX_VECTORS];
			look(&ahead, c);
			UNROLL for (int n = 0; n < vectors; n++) {
				value[n] = load_as(m->v[j], c * m->dim + at + n * VL, kind);
				if (kind == KVS_Q8_0) value[n] *= scales[c * m->blocks + (at + n * VL) / 32];
			}
			UNROLL for (int r = 0; r < rows; r++)
				UNROLL for (int n = 0; n < vectors; n++) acc[r][n] += value[n] * p[r * m->stride + c];
		}
	}
	UNROLL for (int r = 0; r < rows; r++)
		UNROLL for (int n = 0; n < vectors; n++) store(o + r * m->dim + n * VL, acc[r][n]);
}

INLINE void mix_rows(const struct mix *m, const int kind, int64_t row, const int rows)
{
	int64_t at = 0;
	for (; at + MIX_VECTORS * VL <= m->dim; at += MIX_VECTORS * VL) mix_tile(m, kind, row, at, rows, MIX_VECTORS);
	for (; MIX_VECTORS > 2 && at + 2 * VL <= m->dim; at += 2 * VL) mix_tile(m, kind, row, at, rows, 2);
	for (; at < m->dim; at += VL) mix_tile(m, kind, row, at, rows, 1);
}

INLINE void mix_as(const struct mix *m, const int kind, int64_t rows)
{
	int64_t r = 0;
	for (; r + MIX_ROWS <= rows; r += MIX_ROWS) mix_rows(m, kind, r, MIX_ROWS);
	for (; r + 2 <= rows; r += 2) mix_rows(m, kind, r, 2);
	for (; r < rows; r++) mix_rows(m, kind, r, 1);
}

static TARGET void mix(const struct mix *m, int kind, int64_t rows)
{
	switch (kind) {
	case KVS_F16: mix_as(m, KVS_F16, rows); break;
	case KVS_F32: mix_as(m, KVS_F32, rows); break;
	default: mix_as(m, KVS_Q8_0, rows);
	}
}

#include "block_convert.h"
#include "block_item.h"
