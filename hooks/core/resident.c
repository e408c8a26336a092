/*
 * Mode resident: keys and values go into the enclave as they are made, attention over them is computed there, and the engine's
 * cache stays zero. The engine's own attention and its writes into the cache are taken out of the graph.
 */
#include "plan.h"
#include "record.h"

#include <stdlib.h>

/* --- reading and writing the engine's tensors --- */

/* Rows of `floats` floats, one for each token, from `first` on: side by side, or with a stride in between. */
static void get_rows(struct kvs_ggml *g, const struct ggml_tensor *t, uint32_t floats, uint32_t first, uint32_t count, uint8_t *out)
{
    size_t row = (size_t)floats * sizeof(float), stride = row;
    if (kvs_ne(g, t)[0] == (int64_t)floats)
        stride = kvs_nb(g, t)[1];
    if (stride == row) {
        g->tensor_get(t, out, first * row, count * row);
        return;
    }
    for (uint32_t i = 0; i < count; i++)
        g->tensor_get(t, out + i * row, (first + i) * stride, row);
}

/* Queries: [d, tokens, heads, streams] in any order of strides; out is token by token, head by head. */
static void get_queries(struct kvs_ggml *g, struct kvs_plan *p, const struct kvs_step *s, uint32_t first, uint32_t count, uint8_t *out)
{
    const int64_t *ne = kvs_ne(g, s->q);
    const size_t *nb = kvs_nb(g, s->q);
    size_t head = (size_t)ne[0] * sizeof(float), row = head * (size_t)ne[2];
    if (nb[2] == head && nb[1] == row && (ne[3] == 1 || nb[3] == nb[1] * (size_t)ne[1])) {
        g->tensor_get(s->q, out, first * row, count * row);
        return;
    }
    size_t span = g->nbytes(s->q);
    uint8_t *all = kvs_plan_scratch(p, span);
    g->tensor_get(s->q, all, 0, span);
    for (uint32_t i = 0; i < count; i++) {
        size_t block = (first + i) / (size_t)ne[1], token = (first + i) % (size_t)ne[1];
        for (int64_t h = 0; h < ne[2]; h++)
            memcpy(out + i * row + (size_t)h * head, all + block * nb[3] + token * nb[1] + (size_t)h * nb[2], head);
    }
    memset(all, 0, span);
}

/* Answers come token by token, head by head; without flash attention the engine wants them head by head. */
static void put_answers(struct kvs_ggml *g, struct kvs_plan *p, const struct kvs_step *s, uint32_t first, uint32_t count,
                        const uint8_t *in)
{
    size_t head = s->cache->dim_v * sizeof(float), heads = s->cache->heads, row = head * heads;
    if (s->flash) {
        g->tensor_set(s->node, in, first * row, count * row);
        return;
    }
    size_t tokens = (size_t)kvs_ne(g, s->node)[1];
    uint8_t *side = kvs_plan_scratch(p, count * head);
    for (size_t h = 0; h < heads; h++) {
        for (uint32_t i = 0, run; i < count; i += run) {
            size_t block = (first + i) / tokens, token = (first + i) % tokens;
            run = count - i < tokens - token ? count - i : (uint32_t)(tokens - token);
            for (uint32_t j = 0; j < run; j++)
                memcpy(side + j * head, in + (i + j) * row + h * head, head);
            g->tensor_set(s->node, side, ((block * heads + h) * tokens + token) * head, run * head);
        }
    }
    memset(side, 0, count * head);
}

static const uint8_t zeros[64 << 10];

static void wipe(struct kvs_ggml *g, const struct ggml_tensor *t, size_t at, size_t len)
{
    for (size_t n; len > 0; at += n, len -= n) {
        n = len < sizeof zeros ? len : sizeof zeros;
        g->tensor_set((struct ggml_tensor *)(uintptr_t)t, zeros, at, n);
    }
}

/* A tensor of rows is wiped as a whole when nothing but its rows lies in it. */
static void wipe_rows(struct kvs_ggml *g, const struct ggml_tensor *t)
{
    const int64_t *ne = kvs_ne(g, t);
    const size_t *nb = kvs_nb(g, t);
    size_t floats = (size_t)(ne[0] * ne[1] * ne[2] * ne[3]), span = g->nbytes(t);
    if (span == floats * sizeof(float)) {
        wipe(g, t, 0, span);
        return;
    }
    for (int64_t i = 0; i < ne[1] * ne[2] * ne[3]; i++)
        wipe(g, t,
             (size_t)(i % ne[1]) * nb[1] + (size_t)(i / ne[1] % ne[2]) * nb[2] + (size_t)(i / ne[1] / ne[2]) * nb[3],
             (size_t)ne[0] * sizeof(float));
}

/* --- batches --- */

struct batch_head {
    uint32_t mask, tokens, blocks, visible, rows, reserved;
    uint64_t total, offset, reserved2;
};
_Static_assert(sizeof(struct batch_head) == 48, "the head of a batch is 48 bytes on the wire");

/* The batch's bytes from `at` on: cell numbers, then the mask. */
static void batch_bytes(struct kvs_ggml *g, const struct kvs_slot *s, const int64_t *cells, size_t at, size_t len, uint8_t *out)
{
    size_t cell_bytes = s->tokens * sizeof *cells;
    if (at < cell_bytes) {
        size_t n = len < cell_bytes - at ? len : cell_bytes - at;
        memcpy(out, (const uint8_t *)cells + at, n);
        out += n;
        at += n;
        len -= n;
    }
    if (len > 0)
        g->tensor_get(s->mask, out, at - cell_bytes, len);
}

static void read_cells(struct kvs_ggml *g, const struct kvs_slot *s, int64_t *out)
{
    if (g->nbytes(s->cells) == s->tokens * sizeof *out) {
        g->tensor_get(s->cells, out, 0, s->tokens * sizeof *out);
        return;
    }
    if (g->nbytes(s->cells) != s->tokens * sizeof(int32_t))
        kvs_die("the engine's cell numbers are of an unknown type");
    int32_t *narrow = malloc(s->tokens * sizeof *narrow);
    if (!narrow)
        kvs_die("out of memory");
    g->tensor_get(s->cells, narrow, 0, s->tokens * sizeof *narrow);
    for (uint32_t i = 0; i < s->tokens; i++)
        out[i] = narrow[i];
    free(narrow);
}

static void send_batch(struct kvs_ggml *g, struct kvs_slot *s, uint32_t number)
{
    struct batch_head h = {.tokens = s->tokens, .blocks = s->blocks, .visible = s->visible};
    size_t mask = 0;
    if (s->mask) {
        const int64_t *ne = kvs_ne(g, s->mask);
        int type = kvs_type(g, s->mask);
        if ((type != KVS_GGML_TYPE_F16 && type != KVS_GGML_TYPE_F32) || ne[0] != s->visible || ne[2] != 1 || ne[3] != s->blocks ||
            !g->is_contiguous(s->mask))
            kvs_die("the engine's attention mask %s has a shape that kvshield does not know", kvs_name(g, s->mask));
        h.mask = type == KVS_GGML_TYPE_F16 ? 1 : 2;
        h.rows = (uint32_t)ne[1];
        mask = g->nbytes(s->mask);
    }
    int64_t *cells = malloc(s->tokens * sizeof *cells);
    if (!cells)
        kvs_die("out of memory");
    read_cells(g, s, cells);
    h.total = s->tokens * sizeof *cells + mask;
    struct kvs_call call = {.type = KVS_BATCH, .id = number};
    uint8_t *body = kvs_channel_begin(&call);
    size_t room = call.capacity - sizeof h;
    while (h.offset < h.total) {
        size_t n = h.total - h.offset < room ? (size_t)(h.total - h.offset) : room;
        memcpy(body, &h, sizeof h);
        batch_bytes(g, s, cells, (size_t)h.offset, n, body + sizeof h);
        call.payload = (uint32_t)(sizeof h + n);
        kvs_channel_call(&call);
        h.offset += n;
    }
    kvs_channel_end(&call);
    free(cells);
    s->sent = true;
}

/* --- attention --- */

struct attend_head {
    uint32_t slot, put_first, put_count, query_first, query_count;
    float scale, max_bias, softcap;
    uint32_t sinks, k_floats, v_floats, q_floats, out_floats, reserved[3];
};
_Static_assert(sizeof(struct attend_head) == 64, "the head of an attention is 64 bytes on the wire");

struct sizes {
    size_t k, v, q, out, sinks; /* bytes of one token's row */
};

static struct sizes sizes_of(const struct kvs_step *s)
{
    const struct kvs_cache *c = s->cache;
    return (struct sizes){(size_t)c->kv_heads * c->dim_k * 4, (size_t)c->kv_heads * c->dim_v * 4, (size_t)c->heads * c->dim_k * 4,
                          (size_t)c->heads * c->dim_v * 4, s->sinks ? (size_t)c->heads * 4 : 0};
}

/* Rows of a write: from the engine, or as they were taken. */
static void get_written(struct kvs_ggml *g, const struct kvs_write *w, uint32_t floats, uint32_t first, uint32_t count, uint8_t *out)
{
    size_t row = (size_t)floats * sizeof(float);
    if (!w->early)
        get_rows(g, w->source, floats, first, count, out);
    else if (w->rows && (first + count) * row <= w->size)
        memcpy(out, w->rows + first * row, count * row);
    else
        kvs_die("the engine computes attention before the keys and values that it needs");
}

static void take(struct kvs_ggml *g, const struct kvs_step *s)
{
    struct kvs_write *w = s->take;
    uint32_t floats = s->cache->kv_heads * (w->values ? s->cache->dim_v : s->cache->dim_k);
    const int64_t *ne = kvs_ne(g, w->source);
    w->size = (size_t)(ne[0] * ne[1] * ne[2] * ne[3]) * sizeof(float);
    w->rows = malloc(w->size);
    if (!w->rows)
        kvs_die("out of memory");
    get_rows(g, w->source, floats, 0, (uint32_t)(w->size / sizeof(float) / floats), w->rows);
    if (w->scrub)
        wipe_rows(g, w->source);
}

/* One frame: some tokens' keys and values, some tokens' queries. */
static void attend_part(struct kvs_ggml *g, struct kvs_plan *p, const struct kvs_step *s, struct attend_head *h)
{
    struct sizes z = sizes_of(s);
    struct kvs_call call = {.type = KVS_ATTEND, .id = s->cache->id, .layer = s->cache->layer};
    uint8_t *body = kvs_channel_begin(&call), *at = body + sizeof *h;
    h->sinks = h->query_count > 0 && s->sinks ? s->cache->heads : 0;
    memcpy(body, h, sizeof *h);
    if (h->put_count > 0) {
        get_written(g, s->keys, h->k_floats, h->put_first, h->put_count, at);
        at += h->put_count * z.k;
        get_written(g, s->values, h->v_floats, h->put_first, h->put_count, at);
        at += h->put_count * z.v;
    }
    if (h->query_count > 0) {
        get_queries(g, p, s, h->query_first, h->query_count, at);
        at += h->query_count * z.q;
    }
    if (h->sinks) {
        g->tensor_get(s->sinks, at, 0, z.sinks);
        at += z.sinks;
    }
    bool last = h->query_count > 0 && h->query_first + h->query_count == p->slots[s->slot].tokens;
    if (last) { /* before the answer: it may lie where the keys were */
        if (s->keys && s->keys->scrub && !s->keys->early)
            wipe_rows(g, s->keys->source);
        if (s->values && s->values->scrub && !s->values->early)
            wipe_rows(g, s->values->source);
        if (s->scrub_q)
            wipe_rows(g, s->q);
    }
    call.payload = (uint32_t)(at - body);
    const uint8_t *answer = kvs_channel_call(&call);
    if (call.answer != h->query_count * z.out)
        kvs_die("the enclave's answer for layer %u has %u bytes where %zu were expected", s->cache->layer, call.answer,
                h->query_count * z.out);
    if (h->query_count > 0)
        put_answers(g, p, s, h->query_first, h->query_count, answer);
    kvs_channel_end(&call);
}

static uint32_t at_most(uint32_t want, size_t room, size_t each)
{
    return room / each < want ? (uint32_t)(room / each) : want;
}

/*
 * In one frame where it fits. Else all keys and values come first, because a query may look at any of them. An answer must not be
 * written before the last keys are read: the engine may have given it the same memory.
 */
static void attend(struct kvs_ggml *g, struct kvs_plan *p, struct kvs_step *s)
{
    struct kvs_slot *slot = &p->slots[s->slot];
    if (!slot->sent)
        send_batch(g, slot, s->slot);
    struct sizes z = sizes_of(s);
    size_t capacity = kvs_channel_capacity(), room = capacity - sizeof(struct attend_head);
    uint32_t tokens = slot->tokens, puts = s->keys ? tokens : 0;
    struct attend_head h = {.slot = s->slot,
                            .scale = s->scale,
                            .max_bias = s->max_bias,
                            .softcap = s->softcap,
                            .k_floats = (uint32_t)(z.k / 4),
                            .v_floats = (uint32_t)(z.v / 4),
                            .q_floats = (uint32_t)(z.q / 4),
                            .out_floats = (uint32_t)(z.out / 4)};
    if (puts * (z.k + z.v) + tokens * z.q + z.sinks <= room && tokens * z.out <= capacity) {
        h.put_count = puts;
        h.query_count = tokens;
        attend_part(g, p, s, &h);
        return;
    }
    if (room < z.k + z.v || room < z.q + z.sinks || capacity < z.out)
        kvs_die("one token of layer %u does not fit the data plane (%zu bytes); start kvshield with a larger --data-plane-bytes",
                s->cache->layer, capacity);
    for (; h.put_first < puts; h.put_first += h.put_count) {
        h.put_count = at_most(puts - h.put_first, room, z.k + z.v);
        attend_part(g, p, s, &h);
    }
    h.put_count = 0;
    for (; h.query_first < tokens; h.query_first += h.query_count) {
        h.query_count = at_most(tokens - h.query_first, room - z.sinks, z.q);
        h.query_count = at_most(h.query_count, capacity, z.out);
        attend_part(g, p, s, &h);
    }
}

/* --- context shift --- */

struct rotate_head {
    uint32_t first, count, dims, mode, context;
    float base, scale, ext_factor, attn_factor, beta_fast, beta_slow;
    uint32_t factors, hadamard, reserved[3];
};
_Static_assert(sizeof(struct rotate_head) == 64, "the head of a rotation is 64 bytes on the wire");

/* The size of the matrix, which must be the orthonormal Walsh-Hadamard matrix. */
static uint32_t hadamard_of(struct kvs_ggml *g, const struct ggml_tensor *matrix)
{
    size_t n = (size_t)kvs_ne(g, matrix)[0];
    float *m = g->nbytes(matrix) == n * n * sizeof *m ? malloc(n * n * sizeof *m) : NULL;
    if (!m)
        kvs_die("cached keys are multiplied by a matrix that kvshield does not know");
    g->tensor_get(matrix, m, 0, n * n * sizeof *m);
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) {
            float sign = __builtin_parityll(i & j) ? -1 : 1, off = m[i * n + j] * sign * (float)n - m[0] * (float)n;
            if (off > 1e-4f || off < -1e-4f || m[0] * m[0] * (float)n < 0.999f || m[0] * m[0] * (float)n > 1.001f)
                kvs_die("cached keys are multiplied by a matrix that kvshield does not know");
        }
    free(m);
    return (uint32_t)n;
}

static void rotate(struct kvs_ggml *g, const struct kvs_step *s)
{
    const struct ggml_tensor *shift = kvs_src(g, s->node, 1), *factors = kvs_src(g, s->node, 2);
    uint32_t cells = s->cache->cells * s->cache->streams;
    if (g->nbytes(shift) != cells * sizeof(int32_t))
        kvs_die("a context shift of layer %u has %zu bytes for %u cells", s->cache->layer, g->nbytes(shift), cells);
    size_t factor_bytes = factors ? g->nbytes(factors) : 0;
    struct rotate_head h = {.dims = (uint32_t)kvs_param(g, s->node, 1),
                            .mode = (uint32_t)kvs_param(g, s->node, 2),
                            .context = (uint32_t)kvs_param(g, s->node, 4),
                            .base = kvs_paramf(g, s->node, 5),
                            .scale = kvs_paramf(g, s->node, 6),
                            .ext_factor = kvs_paramf(g, s->node, 7),
                            .attn_factor = kvs_paramf(g, s->node, 8),
                            .beta_fast = kvs_paramf(g, s->node, 9),
                            .beta_slow = kvs_paramf(g, s->node, 10),
                            .factors = (uint32_t)(factor_bytes / sizeof(float)),
                            .hadamard = s->hadamard ? hadamard_of(g, s->hadamard) : 0};
    struct kvs_call call = {.type = KVS_ROTATE, .id = s->cache->id, .layer = s->cache->layer};
    uint8_t *body = kvs_channel_begin(&call);
    if (call.capacity < sizeof h + factor_bytes + sizeof(int32_t))
        kvs_die("a context shift does not fit the data plane; start kvshield with a larger --data-plane-bytes");
    for (; h.first < cells; h.first += h.count) {
        h.count = at_most(cells - h.first, call.capacity - sizeof h - factor_bytes, sizeof(int32_t));
        size_t n = h.count * sizeof(int32_t);
        memcpy(body, &h, sizeof h);
        g->tensor_get(shift, body + sizeof h, h.first * sizeof(int32_t), n);
        if (factors)
            g->tensor_get(factors, body + sizeof h + n, 0, factor_bytes);
        call.payload = (uint32_t)(sizeof h + n + factor_bytes);
        kvs_channel_call(&call);
    }
    kvs_channel_end(&call);
}

/* --- a graph --- */

/* Finds the caches of the plan's steps, and declares those that are new. False when the enclave has no room. */
static bool find_caches(struct kvs_plan *p)
{
    struct kvs_cache *fresh = malloc((p->count + 1) * sizeof *fresh);
    size_t count = 0;
    if (!fresh)
        kvs_die("out of memory");
    for (size_t i = 0; i < p->count; i++) {
        struct kvs_step *s = &p->steps[i];
        s->cache = kvs_cache_of(s->k);
        if (s->cache || s->kind != KVS_STEP_ATTEND)
            continue;
        size_t j = 0;
        while (j < count && fresh[j].k != s->k)
            j++;
        if (j == count)
            fresh[count++] = s->shape;
    }
    bool ok = count == 0 || kvs_caches_declare(fresh, count);
    free(fresh);
    for (size_t i = 0; ok && count > 0 && i < p->count; i++)
        p->steps[i].cache = kvs_cache_of(p->steps[i].k);
    return ok;
}

/* Attention over a cache must look the same in every graph. */
static void check_caches(const struct kvs_plan *p)
{
    for (size_t i = 0; i < p->count; i++) {
        const struct kvs_cache *c = p->steps[i].cache, *s = &p->steps[i].shape;
        if (p->steps[i].kind == KVS_STEP_ATTEND &&
            (c->heads != s->heads || c->kv_heads != s->kv_heads || c->dim_k != s->dim_k || c->dim_v != s->dim_v ||
             c->cells != s->cells || c->streams != s->streams))
            kvs_die("layer %u of this engine changed its shape", c->layer);
    }
}

/* Steps of caches that no attention has used yet hold no rows. */
static void drop_unknown(struct kvs_plan *p)
{
    size_t kept = 0;
    for (size_t i = 0; i < p->count; i++)
        if (p->steps[i].cache)
            p->steps[kept++] = p->steps[i];
    p->count = kept;
}

struct use {
    const struct ggml_tensor *base;
    int last; /* node that reads it last */
};

static int by_base(const void *a, const void *b)
{
    const struct use *x = a, *y = b;
    return x->base < y->base ? -1 : x->base > y->base;
}

static struct use *use_of(struct use *uses, size_t n, const struct ggml_tensor *base)
{
    struct use key = {base, 0};
    return bsearch(&key, uses, n, sizeof *uses, by_base);
}

/* What no later node reads can be wiped as soon as it has been taken. */
static void plan_scrub(struct kvs_ggml *g, struct kvs_plan *p, struct ggml_cgraph *graph)
{
    size_t n = 0;
    struct use *uses = malloc((3 * p->count + 1) * sizeof *uses);
    if (!uses)
        kvs_die("out of memory");
    for (size_t i = 0; i < p->count; i++) {
        const struct kvs_step *s = &p->steps[i];
        if (s->kind != KVS_STEP_ATTEND)
            continue;
        uses[n++] = (struct use){kvs_base(g, s->q), -1};
        if (s->keys) {
            uses[n++] = (struct use){kvs_base(g, s->keys->source), -1};
            uses[n++] = (struct use){kvs_base(g, s->values->source), -1};
        }
    }
    qsort(uses, n, sizeof *uses, by_base);
    for (int i = 0, nodes = g->graph_n_nodes(graph); i < nodes; i++) {
        struct ggml_tensor *node = g->graph_node(graph, i);
        if (kvs_op(g, node) == KVS_OP_NOTHING)
            continue;
        for (int j = 0; j < KVS_GGML_MAX_SRC; j++) {
            const struct ggml_tensor *src = kvs_src(g, node, j);
            struct use *u = src ? use_of(uses, n, kvs_base(g, src)) : NULL;
            if (u)
                u->last = i;
        }
    }
    for (size_t i = 0; i < p->count; i++) {
        struct kvs_step *s = &p->steps[i];
        if (s->kind != KVS_STEP_ATTEND)
            continue;
        s->scrub_q = use_of(uses, n, kvs_base(g, s->q))->last < s->at;
        struct kvs_write *both[2] = {s->keys, s->values};
        for (int j = 0; j < 2; j++)
            if (both[j])
                both[j]->scrub = use_of(uses, n, kvs_base(g, both[j]->source))->last < both[j]->at;
    }
    free(uses);
}

bool kvs_resident_begin(struct kvs_ggml *g, struct kvs_plan *p, struct ggml_cgraph *graph)
{
    if (!find_caches(p))
        return false;
    kvs_cells_change();
    check_caches(p);
    drop_unknown(p);
    for (size_t i = 0; i < p->blank_count; i++)
        *kvs_op_of(g, p->blanks[i].node) = 0;
    if (kvs_session_scrubs())
        plan_scrub(g, p, graph);
    kvs_plan_takes(p, g, graph);
    return true;
}

bool kvs_resident_reserve(struct kvs_ggml *g, struct ggml_cgraph *graph)
{
    struct kvs_plan *p = NULL;
    bool ok = !kvs_resident_scan(g, graph, &p) || find_caches(p);
    if (p) {
        free(p->writes);
        free(p->steps);
        free(p->blanks);
        free(p->scratch);
        free(p);
    }
    return ok;
}

#define LOOK_AHEAD 8 /* a device's scheduler may change the order a little */

static struct kvs_step *step_of(const struct kvs_plan *p, const struct ggml_tensor *t)
{
    for (size_t i = p->next; i < p->count && i < p->next + LOOK_AHEAD; i++)
        if (p->steps[i].node == t && !p->steps[i].done)
            return &p->steps[i];
    return NULL;
}

bool kvs_resident_wants(const struct kvs_plan *p, const struct ggml_tensor *t)
{
    return step_of(p, t) != NULL;
}

void kvs_resident_attend(struct kvs_ggml *g, struct kvs_plan *p, const struct ggml_tensor *t)
{
    struct kvs_step *s = step_of(p, t);
    switch (s->kind) {
    case KVS_STEP_ROTATE:
        rotate(g, s);
        break;
    case KVS_STEP_TAKE:
        take(g, s);
        break;
    case KVS_STEP_ATTEND:
        attend(g, p, s);
        break;
    }
    s->done = true;
    while (p->next < p->count && p->steps[p->next].done)
        p->next++;
}

long kvs_resident_missing(const struct kvs_plan *p)
{
    return p->next < p->count ? (long)p->steps[p->next].cache->layer : -1;
}

/* --- what a graph leaves behind --- */

struct range {
    const char *from, *to;
    const struct ggml_tensor *tensor; /* that lies there */
    struct ggml_backend_buffer *buffer;
};

static int by_place(const void *a, const void *b)
{
    const struct range *x = a, *y = b;
    if (x->buffer != y->buffer)
        return x->buffer < y->buffer ? -1 : 1;
    return x->from < y->from ? -1 : x->from > y->from;
}

static void add_range(struct kvs_ggml *g, struct range *list, size_t *n, const struct ggml_tensor *t)
{
    struct ggml_backend_buffer *buffer = kvs_buffer(g, t);
    const char *from = g->get_data(t);
    if (buffer && from)
        list[(*n)++] = (struct range){from, from + g->nbytes(t), t, buffer};
}

/* Wipes a range except for what the graph was computed for. */
static void wipe_range(struct kvs_ggml *g, const struct range *r, const struct range *outputs, size_t count)
{
    const char *origin = g->get_data(r->tensor);
    const char *from = r->from;
    while (from < r->to) {
        const char *to = r->to, *next = r->to;
        for (size_t i = 0; i < count; i++) {
            if (outputs[i].buffer != r->buffer || outputs[i].to <= from || outputs[i].from >= to)
                continue;
            to = outputs[i].from > from ? outputs[i].from : from;
            next = outputs[i].to;
        }
        if (to > from)
            wipe(g, r->tensor, (size_t)(from - origin), (size_t)(to - from));
        from = next > to ? next : to;
        if (to == r->to)
            break;
    }
}

#define OUTPUTS_MAX 64

/* Wipes the memory in which the graph's nodes had their results. */
static void wipe_results(struct kvs_ggml *g, struct kvs_plan *p, struct ggml_cgraph *graph)
{
    int nodes = g->graph_n_nodes(graph);
    struct range outputs[OUTPUTS_MAX], *list = malloc(((size_t)nodes * 3 + 1) * sizeof *list);
    size_t count = 0, n = 0;
    if (!list)
        kvs_die("out of memory");
    for (int i = 0; i < nodes; i++) {
        const struct ggml_tensor *node = g->graph_node(graph, i);
        if (kvs_is_output(g, node) || i == nodes - 1) {
            if (count == OUTPUTS_MAX)
                kvs_die("a graph has more than %d outputs", OUTPUTS_MAX);
            add_range(g, outputs, &count, kvs_base(g, node));
        } else if (!kvs_view_src(g, node)) {
            add_range(g, list, &n, node);
        }
        for (int j = 0; j < 2; j++) { /* copies of results on another device */
            const struct ggml_tensor *src = kvs_src(g, node, j);
            if (src && strchr(kvs_name(g, src), '#') && !kvs_view_src(g, src))
                add_range(g, list, &n, src);
        }
    }
    qsort(list, n, sizeof *list, by_place);
    const char *done = NULL;
    for (size_t i = 0; i < n; i++) {
        struct range r = list[i];
        if (i > 0 && list[i - 1].buffer == r.buffer && done > r.from)
            r.from = done;
        if (r.from >= r.to)
            continue;
        wipe_range(g, &r, outputs, count);
        done = r.to;
    }
    free(list);
    if (p->tokens)
        wipe(g, p->tokens, 0, g->nbytes(p->tokens));
}

void kvs_resident_end(struct kvs_ggml *g, struct kvs_plan *p, void *sched, struct ggml_cgraph *graph)
{
    /* The engine may compute the same graph again. */
    for (size_t i = 0; i < p->blank_count; i++)
        *kvs_op_of(g, p->blanks[i].node) = p->blanks[i].op;
    for (size_t i = 0; i < p->slot_count; i++)
        p->slots[i].sent = false;
    kvs_plan_forget(p);
    if (!kvs_session_scrubs() || p->slot_count == 0)
        return;
    g->backend->synchronize(sched);
    wipe_results(g, p, graph);
}
