/*
 * The requests of one graph in mode resident: which cells and which mask, keys and values and queries.
 */
#include "plan.h"

#include <stdlib.h>

/* --- reading and writing the engine's tensors --- */

/*
 * The first `floats` floats of what is written for each token, from `first` on. Tokens lie side by side, or with a stride in between;
 * an engine may write more for each than this layer has, for the sake of layers with more heads.
 */
static void get_rows(struct kvs_ggml *g, const struct kvs_write *w, uint32_t floats, uint32_t first, uint32_t count, uint8_t *out)
{
    const struct ggml_tensor *t = w->source;
    size_t row = (size_t)floats * sizeof(float), stride = (size_t)w->floats * sizeof(float);
    if (kvs_ne(g, t)[0] == (int64_t)w->floats)
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

/* --- batches --- */

struct batch_head {
    uint32_t mask, tokens, blocks, visible, rows, reserved;
    uint64_t total, offset, reserved2;
};
_Static_assert(sizeof(struct batch_head) == 48, "the head of a batch is 48 bytes on the wire");

/*
 * A mask that begins at a later cell, with what hides the cells before it in front of each row: minus infinity.
 */
static uint8_t *widen_mask(struct kvs_ggml *g, const struct kvs_slot *s, size_t *size)
{
    bool half = kvs_type(g, s->mask) == KVS_GGML_TYPE_F16;
    size_t each = half ? 2 : 4, rows = (size_t)kvs_ne(g, s->mask)[1], before = s->first * each, row = s->visible * each;
    uint8_t *all = malloc(rows * (before + row));
    if (!all)
        kvs_die("out of memory");
    for (size_t i = 0; i < rows; i++) {
        uint8_t *at = all + i * (before + row);
        for (uint32_t j = 0; j < s->first; j++)
            if (half)
                memcpy(at + j * each, &(uint16_t){0xfc00}, each);
            else
                memcpy(at + j * each, &(uint32_t){0xff800000}, each);
        g->tensor_get(s->mask, at + before, i * row, row);
    }
    *size = rows * (before + row);
    return all;
}

/* The batch's bytes from `at` on: cell numbers, then the mask. */
static void batch_bytes(struct kvs_ggml *g, const struct kvs_slot *s, const int64_t *cells, const uint8_t *widened, size_t at, size_t len,
                        uint8_t *out)
{
    size_t cell_bytes = s->tokens * sizeof *cells;
    if (at < cell_bytes) {
        size_t n = len < cell_bytes - at ? len : cell_bytes - at;
        memcpy(out, (const uint8_t *)cells + at, n);
        out += n;
        at += n;
        len -= n;
    }
    if (len > 0 && widened)
        memcpy(out, widened + at - cell_bytes, len);
    else if (len > 0)
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

/* Whose batch the enclave holds in each slot: another context of this process may compute at the same time. Read and written while the
 * data plane is taken. */
static const struct kvs_slot *owners[KVS_SLOTS];

static void send_batch(struct kvs_ggml *g, struct kvs_slot *s, uint32_t number)
{
    struct batch_head h = {.tokens = s->tokens, .blocks = s->blocks, .visible = s->first + s->visible};
    size_t mask = 0;
    uint8_t *widened = NULL;
    if (s->first > 0 && !s->mask)
        kvs_die("the engine looks at a part of its cache, without a mask");
    if (s->mask) {
        const int64_t *ne = kvs_ne(g, s->mask);
        int type = kvs_type(g, s->mask);
        if ((type != KVS_GGML_TYPE_F16 && type != KVS_GGML_TYPE_F32) || ne[0] != s->visible || ne[2] != 1 || ne[3] != s->blocks ||
            !g->is_contiguous(s->mask))
            kvs_die("the engine's attention mask %s has a shape that kvshield does not know", kvs_name(g, s->mask));
        h.mask = type == KVS_GGML_TYPE_F16 ? 1 : 2;
        h.rows = (uint32_t)ne[1];
        mask = g->nbytes(s->mask);
        if (s->first > 0)
            widened = widen_mask(g, s, &mask);
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
        batch_bytes(g, s, cells, widened, (size_t)h.offset, n, body + sizeof h);
        call.payload = (uint32_t)(sizeof h + n);
        kvs_channel_call(&call);
        h.offset += n;
    }
    owners[number] = s;
    kvs_channel_end(&call);
    free(cells);
    free(widened);
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
        get_rows(g, w, floats, first, count, out);
    else if (w->rows && (first + count) * row <= w->size)
        memcpy(out, w->rows + first * row, count * row);
    else
        kvs_die("the engine computes attention before the keys and values that it needs");
}

void kvs_take(struct kvs_ggml *g, const struct kvs_step *s)
{
    struct kvs_write *w = s->take;
    uint32_t floats = s->cache->kv_heads * (w->values ? s->cache->dim_v : s->cache->dim_k);
    uint32_t tokens = (uint32_t)(kvs_elements(g, w->source) / w->floats);
    w->size = (size_t)tokens * floats * sizeof(float);
    w->rows = malloc(w->size);
    if (!w->rows)
        kvs_die("out of memory");
    get_rows(g, w, floats, 0, tokens, w->rows);
    if (w->scrub)
        kvs_wipe_rows(g, w->source);
}

/*
 * Keys and values are wiped once all are taken, and so before any answer: the engine may have given the answers their memory.
 */
static void wipe_taken(struct kvs_ggml *g, const struct kvs_step *s, const struct attend_head *h, uint32_t tokens)
{
    struct kvs_write *both[2] = {s->keys, s->values};
    if (h->put_count > 0 && h->put_first + h->put_count == tokens)
        for (int i = 0; i < 2; i++)
            if (both[i]->scrub && !both[i]->early)
                kvs_wipe_rows(g, both[i]->source);
    if (s->scrub_q && h->query_count > 0 && h->query_first + h->query_count == tokens)
        kvs_wipe_rows(g, s->q);
}

/* Takes the data plane with this graph's batch in its slot. */
static uint8_t *begin_attention(struct kvs_ggml *g, struct kvs_slot *slot, uint32_t number, struct kvs_call *call)
{
    uint8_t *body = kvs_channel_begin(call);
    while (!slot->sent || owners[number] != slot) {
        kvs_channel_end(call);
        send_batch(g, slot, number);
        body = kvs_channel_begin(call);
    }
    call->type = KVS_ATTEND;
    return body;
}

/* One frame: some tokens' keys and values, some tokens' queries. */
static void attend_part(struct kvs_ggml *g, struct kvs_plan *p, const struct kvs_step *s, struct attend_head *h)
{
    struct sizes z = sizes_of(s);
    struct kvs_call call = {.id = s->cache->id, .layer = s->cache->layer};
    uint8_t *body = begin_attention(g, &p->slots[s->slot], s->slot, &call), *at = body + sizeof *h;
    h->sinks = h->query_count > 0 && s->sinks ? s->cache->heads : 0;
    memcpy(body, h, sizeof *h);
    if (h->put_count > 0) {
        get_written(g, s->keys, h->k_floats, h->put_first, h->put_count, at);
        const uint8_t *keys = at;
        at += h->put_count * z.k;
        if (s->values != s->keys)
            get_written(g, s->values, h->v_floats, h->put_first, h->put_count, at);
        else
            for (uint32_t i = 0; i < h->put_count; i++)
                memcpy(at + i * z.v, keys + i * z.k, z.v);
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
    wipe_taken(g, s, h, p->slots[s->slot].tokens);
    call.payload = (uint32_t)(at - body);
    const uint8_t *answer = kvs_channel_call(&call);
    if (call.answer != h->query_count * z.out)
        kvs_die("the enclave's answer for layer %u has %u bytes where %zu were expected", s->cache->layer, call.answer,
                h->query_count * z.out);
    if (h->query_count > 0)
        put_answers(g, p, s, h->query_first, h->query_count, answer);
    kvs_channel_end(&call);
}

/*
 * In one frame where it fits. Else all keys and values come first, because a query may look at any of them. An answer must not be
 * written before the last keys are read: the engine may have given it the same memory.
 */
void kvs_attend(struct kvs_ggml *g, struct kvs_plan *p, struct kvs_step *s)
{
    struct kvs_slot *slot = &p->slots[s->slot];
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
        h.put_count = kvs_at_most(puts - h.put_first, room, z.k + z.v);
        attend_part(g, p, s, &h);
    }
    h.put_count = 0;
    for (; h.query_first < tokens; h.query_first += h.query_count) {
        h.query_count = kvs_at_most(tokens - h.query_first, room - z.sinks, z.q);
        h.query_count = kvs_at_most(h.query_count, capacity, z.out);
        attend_part(g, p, s, &h);
    }
}
