// Between floats and what the cache stores. Part of block.h.

static TARGET void widen(const uint16_t *from, float *to, int64_t n)
{
	for (int64_t i = 0; i < n; i += VL) store(to + i, LOAD_HALF(from + i));
}

// widen_keys writes a panel of keys as floats, in the same order.
static TARGET void widen_keys(const struct kvs_job *j, const uint8_t *k, float *to)
{
	if (j->storage == KVS_F16) {
		widen((const uint16_t *)(const void *)k, to, j->dim_k * KVS_PANEL);
		return;
	}
	const int8_t *whole = (const int8_t *)k;
	const uint16_t *scales = (const uint16_t *)(const void *)(k + j->dim_k * KVS_PANEL);
	for (int64_t d = 0; d < j->dim_k; d++)
		for (int c = 0; c < KVS_PANEL; c += VL)
			store(to + d * KVS_PANEL + c,
			      LOAD_INT8(whole + d * KVS_PANEL + c) * LOAD_HALF(scales + d / 32 * KVS_PANEL + c));
}

// widen_scales writes the scale factors of a panel of values as floats.
static TARGET void widen_scales(const struct kvs_job *j, const uint8_t *v, float *to)
{
	widen((const uint16_t *)(const void *)(v + j->dim_vp * KVS_PANEL), to, (j->dim_v + 31) / 32 * KVS_PANEL);
}

// widen_values writes a panel of values as floats. `scales` is room for a panel's scale factors.
static TARGET void widen_values(const struct kvs_job *j, const uint8_t *v, float *to, float *scales)
{
	if (j->storage == KVS_F16) {
		widen((const uint16_t *)(const void *)v, to, j->dim_vp * KVS_PANEL);
		return;
	}
	const int8_t *whole = (const int8_t *)v;
	int64_t blocks = (j->dim_v + 31) / 32;
	widen_scales(j, v, scales);
	for (int64_t c = 0; c < KVS_PANEL; c++)
		for (int64_t d = 0; d < j->dim_vp; d += VL) {
			int64_t i = c * j->dim_vp + d;
			store(to + i, LOAD_INT8(whole + i) * scales[c * blocks + d / 32]);
		}
}

// narrow rounds n floats to F16 and says whether one of them is infinite or not a number then.
static TARGET int narrow(const float *from, uint16_t *to, int64_t n)
{
	int64_t i = 0;
	for (; i + VL <= n; i += VL) STORE_HALF(to + i, load(from + i));
	if (i < n) {
		float rest[VL] = {0};
		uint16_t halves[VL];
		memcpy(rest, from + i, (size_t)(n - i) * sizeof *rest);
		STORE_HALF(halves, load(rest));
		memcpy(to + i, halves, (size_t)(n - i) * sizeof *to);
	}
	int bad = 0;
	for (i = 0; i < n; i++) bad |= (to[i] & 0x7c00) == 0x7c00;
	return bad;
}

// quantise is ggml's Q8_0: blocks of 32 with one F16 scale, the largest value becomes ±127. The last block may be short.
static TARGET int quantise(const float *from, int8_t *to, uint16_t *scales, int64_t n)
{
	float scale[KVS_MAX_DIM / 32];
	int bad = 0;
	for (int64_t b = 0; b * 32 < n; b++) {
		int64_t len = n - b * 32 < 32 ? n - b * 32 : 32;
		const float *x = from + b * 32;
		float top = 0, zero = 0;
		for (int64_t i = 0; i < len; i++) {
			top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
			zero += x[i] * 0.0f;
		}
		bad |= zero != 0.0f;
		scale[b] = top / 127.0f;
		float inverse = top > 0 ? 1.0f / scale[b] : 0.0f;
		if (bad || !(inverse <= 3.4e38f)) inverse = 0;
		for (int64_t i = 0; i < len; i++) {
			float y = x[i] * inverse;
			to[b * 32 + i] = bad ? 0 : (int8_t)(y + (y < 0 ? -0.5f : 0.5f));
		}
	}
	return narrow(scale, scales, (n + 31) / 32) | bad;
}

static TARGET int put_f32(const struct kvs_cell *c, const float *k, const float *v, uint8_t *kp, uint8_t *vp, int64_t cell)
{
	float zero = 0, *keys = (float *)(void *)kp, *values = (float *)(void *)vp + cell * c->dim_vp;
	for (int64_t d = 0; d < c->dim_k; d++) {
		zero += k[d] * 0.0f;
		keys[d * KVS_PANEL + cell] = k[d];
	}
	for (int64_t d = 0; d < c->dim_v; d++) {
		zero += v[d] * 0.0f;
		values[d] = v[d];
	}
	return zero != 0.0f;
}

static TARGET int put_f16(const struct kvs_cell *c, const float *k, const float *v, uint8_t *kp, uint8_t *vp, int64_t cell)
{
	uint16_t row[KVS_MAX_DIM], *keys = (uint16_t *)(void *)kp + cell;
	int bad = narrow(k, row, c->dim_k);
	for (int64_t d = 0; d < c->dim_k; d++) keys[d * KVS_PANEL] = row[d];
	return narrow(v, (uint16_t *)(void *)vp + cell * c->dim_vp, c->dim_v) | bad;
}

static TARGET int put_q8_0(const struct kvs_cell *c, const float *k, const float *v, uint8_t *kp, uint8_t *vp, int64_t cell)
{
	int8_t row[KVS_MAX_DIM];
	uint16_t scales[KVS_MAX_DIM / 32], *panel = (uint16_t *)(void *)(kp + c->dim_k * KVS_PANEL);
	int bad = quantise(k, row, scales, c->dim_k);
	for (int64_t d = 0; d < c->dim_k; d++) kp[d * KVS_PANEL + cell] = (uint8_t)row[d];
	for (int64_t b = 0; b * 32 < c->dim_k; b++) panel[b * KVS_PANEL + cell] = scales[b];
	int64_t blocks = (c->dim_v + 31) / 32;
	return quantise(v, (int8_t *)vp + cell * c->dim_vp,
			(uint16_t *)(void *)(vp + c->dim_vp * KVS_PANEL) + cell * blocks, c->dim_v) | bad;
}

// kvs_put stores one cell's keys and values of all KV heads; 1: one of them is no finite number in this storage.
TARGET int NAME(kvs_put)(const struct kvs_cell *c, const float *k, const float *v, uintptr_t page)
{
	int bad = 0;
	int64_t panel = c->cell / KVS_PANEL, cell = c->cell % KVS_PANEL;
	for (int64_t h = 0; h < c->kv_heads; h++, k += c->dim_k, v += c->dim_v) {
		uint8_t *kp = (uint8_t *)page + c->k_at + h * c->k_head + panel * c->k_panel;
		uint8_t *vp = (uint8_t *)page + c->v_at + h * c->v_head + panel * c->v_panel;
		switch (c->storage) {
		case KVS_F32: bad |= put_f32(c, k, v, kp, vp, cell); break;
		case KVS_F16: bad |= put_f16(c, k, v, kp, vp, cell); break;
		default: bad |= put_q8_0(c, k, v, kp, vp, cell);
		}
	}
	return bad;
}
