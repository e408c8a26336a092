// One piece of work: the queries of some tokens and one group of query heads, over some panels. Part of block.h.

// work is the scratch memory of one thread, cut up; scratchFloats in job.go has the same sizes.
struct work {
	float *q, *p, *keep, *k, *v, *scales, *mask;
	float *max, *sum, *o; // the partial result
	int64_t stride;	      // floats in a row of p
};

static inline int64_t round16(int64_t n) { return (n + 15) & ~(int64_t)15; }

static struct work cut(const struct kvs_job *j, float *s, float *part)
{
	struct work w = {.stride = KVS_BLOCK * KVS_PANEL};
	w.q = s, s += round16(j->rows_max * j->dim_k);
	w.p = s, s += j->rows_max * w.stride;
	w.keep = s, s += round16(j->rows_max);
	w.k = s, s += j->dim_k * KVS_PANEL;
	w.v = s, s += j->dim_vp * KVS_PANEL * KVS_BLOCK;
	w.scales = s, s += KVS_BLOCK * round16((j->dim_v + 31) / 32 * KVS_PANEL);
	w.mask = s;
	w.max = part, w.sum = part + round16(j->rows_max), w.o = part + 2 * round16(j->rows_max);
	return w;
}

// pack gathers the rows' queries, scaled; 1: one is not finite.
static TARGET int pack(const struct kvs_job *j, const float *q, struct work *w)
{
	float scale = j->softcap != 0 ? j->scale / j->softcap : j->scale, zero = 0;
	int64_t n = j->group * j->dim_k;
	for (int64_t t = 0; t < j->tokens; t++) {
		const float *from = q + ((j->first + t) * j->query_heads + j->head * j->group) * j->dim_k;
		float *to = w->q + t * n;
		int64_t i = 0;
		vf zeros = splat(0);
		for (; i + VL <= n; i += VL) {
			vf x = load(from + i);
			zeros += x * 0.0f;
			store(to + i, x * scale);
		}
		for (; i < n; i++) {
			zero += from[i] * 0.0f;
			to[i] = from[i] * scale;
		}
		zero += vsum(zeros);
	}
	return zero != 0.0f;
}

// mask_panel writes the mask of one token over a panel as floats; cells past the mask are hidden.
static TARGET void mask_panel(const struct kvs_job *j, const uint8_t *mask, int64_t token, int64_t panel, float *to)
{
	int64_t cell = panel * KVS_PANEL, left = j->mask_cells - cell, size = j->mask_type == KVS_MASK_F16 ? 2 : 4;
	const uint8_t *from = j->mask_type == KVS_NO_MASK ? 0 : mask + (token * j->mask_cells + cell) * size;
	if (j->mask_type == KVS_NO_MASK) {
		for (int c = 0; c < KVS_PANEL; c++) to[c] = c < left ? 0.0f : -INFINITY;
	} else if (j->mask_type == KVS_MASK_F32) {
		for (int c = 0; c < KVS_PANEL; c++) to[c] = -INFINITY;
		memcpy(to, from, (size_t)(left < KVS_PANEL ? left : KVS_PANEL) * sizeof *to);
	} else if (left >= KVS_PANEL) {
		widen((const uint16_t *)(const void *)from, to, KVS_PANEL);
	} else {
		uint16_t row[KVS_PANEL];
		for (int c = 0; c < KVS_PANEL; c++) row[c] = 0xfc00;
		memcpy(row, from, (size_t)left * sizeof *row);
		widen(row, to, KVS_PANEL);
	}
}

// weigh turns one row of products into weights e^(s - max) and moves the row's running maximum and sum on.
static TARGET void weigh(const struct kvs_job *j, struct work *w, int64_t row, float slope, int64_t n)
{
	float *p = w->p + row * w->stride, old = w->max[row];
	vf tops = splat(old), bias = splat(slope);
	for (int64_t i = 0; i < n; i += VL) {
		vf s = load(p + i);
		if (j->softcap != 0) s = vtanh(s) * j->softcap;
		s += load(w->mask + i) * bias;
		tops = VMAX(tops, s);
		store(p + i, s);
	}
	float top = vmax(tops);
	w->keep[row] = 1;
	if (top == -INFINITY) {
		memset(p, 0, (size_t)n * sizeof *p);
		w->max[row] = -FLT_MAX; // it saw something, but no logit yet that a float can hold
		return;
	}
	vf sums = splat(0);
	for (int64_t i = 0; i < n; i += VL) {
		vf e = vexp(load(p + i) - top);
		sums += e;
		store(p + i, e);
	}
	if (top > old) w->keep[row] = exp1(old - top);
	w->max[row] = top;
	w->sum[row] = w->sum[row] * w->keep[row] + vsum(sums);
}

struct block {
	int64_t n, panel[KVS_BLOCK];
	const uint8_t *k[KVS_BLOCK], *v[KVS_BLOCK];
};

static const uint16_t *key_scales(const struct kvs_job *j, const uint8_t *k)
{
	return (const uint16_t *)(const void *)(k + j->dim_k * KVS_PANEL);
}

// run handles the rows of consecutive tokens that see something of the block. m lacks the rows.
static TARGET void run(const struct kvs_job *j, const uint8_t *mask, const float *slopes, struct work *w, const struct block *b,
		       int64_t first, int64_t end, struct mix *m, int kind)
{
	for (int64_t t = first; t < end; t++) {
		for (int64_t i = 0; i < b->n; i++) mask_panel(j, mask, j->first + t, b->panel[i], w->mask + i * KVS_PANEL);
		for (int64_t h = 0; h < j->group; h++)
			weigh(j, w, t * j->group + h, slopes[j->head * j->group + h], b->n * KVS_PANEL);
	}
	int64_t row = first * j->group;
	m->p = w->p + row * w->stride, m->keep = w->keep + row, m->o = w->o + row * j->dim_vp;
	mix(m, kind, (end - first) * j->group);
}

static int sees(const struct kvs_job *j, const uint32_t *vis, int64_t t, const struct block *b)
{
	uint32_t any = 0;
	for (int64_t i = 0; i < b->n; i++) any |= vis[(j->first + t) * j->vis_stride + b->panel[i]];
	return any != 0;
}

// next_run finds the next run of tokens that see something of the block, from *end on.
static int next_run(const struct kvs_job *j, const uint32_t *vis, const struct block *b, int64_t *first, int64_t *end)
{
	int64_t t = *end;
	while (t < j->tokens && !sees(j, vis, t, b)) t++;
	*first = t;
	while (t < j->tokens && sees(j, vis, t, b)) t++;
	*end = t;
	return *first < *end;
}

// multiply fills the weights with the products of queries and keys. Values are fetched meanwhile.
static TARGET void multiply(const struct kvs_job *j, const uint32_t *vis, struct work *w, const struct block *b, int kind)
{
	for (int64_t i = 0; i < b->n; i++) {
		struct keys k = {.at = b->k[i], .scales = key_scales(j, b->k[i])};
		k.ahead = ahead_of(b->v[i], j->v_panel, j->dim_k);
		if (kind != j->storage) {
			widen_keys(j, b->k[i], w->k);
			k = (struct keys){.at = w->k};
		}
		for (int64_t first = 0, end = 0; next_run(j, vis, b, &first, &end);)
			dot(w->q + first * j->group * j->dim_k, j->dim_k, &k, kind,
			    w->p + first * j->group * w->stride + i * KVS_PANEL, w->stride, (end - first) * j->group);
	}
}

// attend_block takes a block into the partial result. The next block's keys are fetched meanwhile.
static TARGET void attend_block(const struct kvs_job *j, const uint8_t *mask, const uint32_t *vis, const float *slopes,
				struct work *w, const struct block *b, const struct block *next)
{
	// For many rows elements are converted once, into scratch memory; few would not pay for that.
	int kind = j->tokens * j->group > KVS_DIRECT ? KVS_F32 : (int)j->storage;
	multiply(j, vis, w, b, kind);
	struct mix m = {.panels = b->n, .dim = j->dim_vp, .stride = w->stride, .scales = w->scales};
	if (kind == KVS_Q8_0) m.blocks = (j->dim_v + 31) / 32;
	for (int64_t i = 0; i < b->n; i++) {
		m.v[i] = b->v[i];
		if (kind != j->storage) {
			m.v[i] = w->v + i * j->dim_vp * KVS_PANEL;
			widen_values(j, b->v[i], w->v + i * j->dim_vp * KVS_PANEL, w->scales);
			continue;
		}
		m.ahead[i] = ahead_of(next->k[i], j->k_panel, KVS_PANEL);
		if (kind == KVS_Q8_0) widen_scales(j, b->v[i], w->scales + i * m.blocks * KVS_PANEL);
	}
	for (int64_t first = 0, end = 0; next_run(j, vis, b, &first, &end);)
		run(j, mask, slopes, w, b, first, end, &m, kind);
}

static int visible(const struct kvs_job *j, const uint32_t *vis, int64_t panel)
{
	uint32_t any = 0;
	for (int64_t t = 0; t < j->tokens; t++) any |= vis[(j->first + t) * j->vis_stride + panel];
	return any != 0;
}

// take collects the next visible panels, from *panel on.
static TARGET void take(const struct kvs_job *j, const uint32_t *vis, const uintptr_t *pages, int64_t *panel, struct block *b)
{
	memset(b, 0, sizeof *b);
	for (; *panel < j->panel_hi && b->n < KVS_BLOCK; ++*panel) {
		if (!visible(j, vis, *panel)) continue;
		const uint8_t *page = (const uint8_t *)pages[*panel / KVS_PAGE_PANELS];
		b->panel[b->n] = *panel;
		b->k[b->n] = page + j->k_at + *panel % KVS_PAGE_PANELS * j->k_panel;
		b->v[b->n++] = page + j->v_at + *panel % KVS_PAGE_PANELS * j->v_panel;
	}
}

// kvs_item computes the partial result of one piece of work: for each row the largest logit, the sum of the weights and the
// weighted sum of the values. 1: a query is not finite.
TARGET int NAME(kvs_item)(const struct kvs_job *j, const float *q, const uint8_t *mask, const uint32_t *vis,
			  const uintptr_t *pages, const float *slopes, float *scratch, float *part)
{
	struct work w = cut(j, scratch, part);
	int64_t rows = j->tokens * j->group, panel = j->panel_lo;
	for (int64_t r = 0; r < rows; r++) w.max[r] = -INFINITY, w.sum[r] = 0;
	memset(w.o, 0, (size_t)(rows * j->dim_vp) * sizeof *w.o);
	if (pack(j, q, &w)) return 1;
	struct block now, next;
	for (take(j, vis, pages, &panel, &now); now.n > 0; now = next) {
		take(j, vis, pages, &panel, &next);
		attend_block(j, mask, vis, slopes, &w, &now, &next);
	}
	return 0;
}

// merge_row joins a row's partial results and its sink; 1: not finite.
static TARGET int merge_row(const struct kvs_job *j, const float *parts, int64_t splits, int64_t stride, int64_t row,
			    const float *sink, float *out)
{
	int64_t padded = round16(j->rows_max);
	float top = sink ? *sink : -INFINITY, sum = 0, zero = 0;
	for (int64_t s = 0; s < splits; s++) {
		top = parts[s * stride + row] > top ? parts[s * stride + row] : top;
		zero += parts[s * stride + padded + row] * 0.0f; // a maximum that is no number loses every comparison
	}
	if (sink) sum = exp1(*sink - top);
	memset(out, 0, (size_t)j->dim_v * sizeof *out);
	for (int64_t s = 0; s < splits && top != -INFINITY; s++) {
		const float *part = parts + s * stride, *o = part + 2 * padded + row * j->dim_vp;
		float share = exp1(part[row] - top);
		sum += part[padded + row] * share;
		for (int64_t d = 0; d < j->dim_v; d++) out[d] += o[d] * share;
	}
	if (sum == 0) return top != -INFINITY || zero != 0.0f;
	float inverse = 1 / sum;
	zero += sum * 0.0f;
	for (int64_t d = 0; d < j->dim_v; d++) {
		out[d] *= inverse;
		zero += out[d] * 0.0f;
	}
	return zero != 0.0f;
}

// kvs_finish writes the output of one tile of tokens from its partial results, `stride` floats apart. A row that sees
// nothing is zero. 1: a result is not finite.
TARGET int NAME(kvs_finish)(const struct kvs_job *j, const float *parts, int64_t splits, int64_t stride, const float *sinks,
			    float *out)
{
	int bad = 0;
	for (int64_t t = 0; t < j->tokens; t++)
		for (int64_t h = 0; h < j->group; h++) {
			int64_t head = j->head * j->group + h;
			bad |= merge_row(j, parts, splits, stride, t * j->group + h, sinks ? sinks + head : 0,
					 out + ((j->first + t) * j->query_heads + head) * j->dim_v);
		}
	return bad;
}
