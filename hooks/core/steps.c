/*
 * What the scan of a graph makes of a node that reads a cache: attention in one operation, attention in several, a context shift. What
 * does not look as it should ends the process.
 */
#include "scan.h"

#include <stdlib.h>
#include <string.h>

static uint32_t storage_of(int type)
{
    switch (type) {
    case KVS_GGML_TYPE_F16:
        return 0;
    case KVS_GGML_TYPE_F32:
    case KVS_GGML_TYPE_BF16: /* F16 has not its range */
        return 1;
    }
    return 2;
}

/* The first cell that is looked at. libllama begins with the first of all; where an engine does not, a cell is as long as its keys. */
static uint32_t first_cell(struct kvs_ggml *g, const struct kvs_step *s, const struct ggml_tensor *kview, int64_t streams)
{
    if (!g->cache_heads)
        return 0;
    const struct ggml_tensor *view = kview;
    while (kvs_op(g, view) == KVS_OP_COPY)
        view = kvs_src(g, view, 0);
    const char *from = g->get_data(view), *all = g->get_data(s->k);
    size_t cell = kvs_nb(g, s->k)[2], offset = (size_t)(from - all);
    if (!from || !all || from < all || offset % cell != 0 || streams != 1)
        kvs_not_known(g, s->node, "looks at a part of a cell");
    return (uint32_t)(offset / cell);
}

/* What an attention over these views of a cache looks like. K: [d, visible, heads, streams], Q: [d, tokens, heads, streams]. */
static void shape(struct kvs_ggml *g, struct kvs_step *s, const struct ggml_tensor *kview, const struct ggml_tensor *v,
                  uint32_t dim_v)
{
    const int64_t *k = kvs_ne(g, kview), *q = kvs_ne(g, s->q), *all = kvs_ne(g, s->k);
    uint32_t layer = (uint32_t)strtoul(kvs_name(g, s->k) + 9, NULL, 10);
    bool fits = g->cache_heads ? all[0] == k[0] && all[1] == k[2] : all[0] == k[0] * k[2];
    int64_t cells = g->cache_heads ? all[2] : all[1], streams = g->cache_heads ? all[3] : all[2];
    if (q[0] != k[0] || q[3] != k[3] || k[2] == 0 || q[2] % k[2] != 0 || !fits || kvs_type(g, s->q) != KVS_GGML_TYPE_F32)
        kvs_not_known(g, s->node, "has queries that do not fit its keys");
    s->first = first_cell(g, s, kview, streams);
    s->visible = (uint32_t)k[1];
    if (s->first + k[1] > cells)
        kvs_not_known(g, s->node, "looks at cells behind the last one");
    s->shape = (struct kvs_cache){.k = s->k,
                                  .v = v,
                                  .buffer = kvs_buffer(g, s->k),
                                  .layer = layer,
                                  .heads = (uint32_t)q[2],
                                  .kv_heads = (uint32_t)k[2],
                                  .dim_k = (uint32_t)k[0],
                                  .dim_v = dim_v,
                                  .cells = (uint32_t)cells,
                                  .streams = (uint32_t)streams,
                                  .storage = storage_of(kvs_type(g, s->k))};
}

/* How many floats are written for each token: as many as are attended to, or more where layers with other head counts share a layout. */
static void count_floats(struct kvs_ggml *g, const struct kvs_step *s, struct kvs_write *w, uint32_t least, uint32_t most)
{
    int64_t tokens = kvs_elements(g, s->cells_of->cells), all = kvs_elements(g, w->source);
    if (tokens < 1 || all % tokens != 0 || all / tokens < least || all / tokens > most)
        kvs_not_known(g, w->node, "writes something else than this layer's heads");
    w->floats = (uint32_t)(all / tokens);
}

static void find_writes(struct kvs_plan *p, struct kvs_ggml *g, struct kvs_step *s, const struct ggml_tensor *v)
{
    struct kvs_write *keys = kvs_write_of(p, s->k), *values = v == s->k ? keys : kvs_write_of(p, v);
    if (!keys || !values)
        kvs_not_known(g, s->node, "reads a cache that this graph does not write");
    s->cells_of = keys;
    const struct kvs_cache *c = &s->shape;
    count_floats(g, s, keys, c->kv_heads * c->dim_k, c->kv_heads * c->dim_k);
    if (values != keys)
        count_floats(g, s, values, c->kv_heads * c->dim_v, UINT32_MAX);
    if (keys->taken)
        return;
    keys->taken = values->taken = true;
    s->keys = keys;
    s->values = values;
}

/*
 * Latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1) keeps one row for keys and values: values are where its first
 * floats are. Anything else than values of their own, or that, is not known.
 */
static bool holds_values(struct kvs_ggml *g, const struct ggml_tensor *cache, const struct ggml_tensor *k, const struct ggml_tensor *view)
{
    if (!cache || kvs_is_values(g, cache))
        return cache != NULL;
    for (int depth = 0; depth < 16 && kvs_op(g, view) == KVS_OP_COPY; depth++)
        view = kvs_src(g, view, 0);
    return cache == k && kvs_ne(g, view)[2] == 1 && g->get_data(view) == g->get_data(k);
}

void kvs_step_flash(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_tensor *node, const struct ggml_tensor *k, int at)
{
    const struct ggml_tensor *v = kvs_cache_behind(p, g, kvs_src(g, node, 2));
    if (kvs_is_values(g, k) || !holds_values(g, v, k, kvs_src(g, node, 2)))
        kvs_not_known(g, node, "reads values from somewhere else than a cache");
    struct kvs_step *s = kvs_plan_add_step(p, KVS_STEP_ATTEND, node, at);
    s->flash = true;
    s->k = k;
    s->q = kvs_src(g, node, 0);
    s->mask = kvs_src(g, node, 3);
    s->sinks = kvs_src(g, node, 4);
    s->scale = kvs_paramf(g, node, 0);
    s->max_bias = kvs_paramf(g, node, 1);
    s->softcap = kvs_paramf(g, node, 2);
    shape(g, s, kvs_src(g, node, 1), v, (uint32_t)kvs_ne(g, kvs_src(g, node, 2))[0]);
    find_writes(p, g, s, v);
    kvs_plan_blank(p, g, node);
}

/*
 * Attention without FLASH_ATTN_EXT: MUL_MAT(K, Q), perhaps soft-capped by SCALE, TANH, SCALE, then SOFT_MAX, then MUL_MAT(V, .).
 */
void kvs_step_plain(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_cgraph *graph, const struct ggml_tensor *k, int at)
{
    struct ggml_tensor *product = g->graph_node(graph, at), *tip = product;
    struct kvs_step *s = kvs_plan_add_step(p, KVS_STEP_ATTEND, product, at);
    float before = 1, after = 1;
    bool capped = false, softened = false;
    s->k = k;
    s->q = kvs_src(g, product, 1);
    s->scale = 1;
    kvs_plan_blank(p, g, product);
    for (int i = at + 1, n = g->graph_n_nodes(graph); i < n; i++) {
        struct ggml_tensor *node = g->graph_node(graph, i);
        enum kvs_op op = kvs_op(g, node);
        if (kvs_src(g, node, 0) != tip && kvs_src(g, node, 1) != tip)
            continue;
        if (op == KVS_OP_NOTHING) {
            tip = node;
        } else if (op == KVS_OP_SCALE && !softened && kvs_paramf(g, node, 1) == 0.0f) {
            *(capped ? &after : &before) *= kvs_paramf(g, node, 0);
            kvs_plan_blank(p, g, tip = node);
        } else if (!softened && !capped && strcmp(g->op_desc(node), "TANH") == 0) {
            capped = true;
            kvs_plan_blank(p, g, tip = node);
        } else if (op == KVS_OP_SOFT_MAX && !softened) {
            softened = true;
            s->mask = kvs_src(g, node, 1);
            s->sinks = kvs_src(g, node, 2);
            after *= kvs_paramf(g, node, 0);
            s->max_bias = kvs_paramf(g, node, 1);
            kvs_plan_blank(p, g, tip = node);
        } else if (op == KVS_OP_MUL_MAT && softened) {
            const struct ggml_tensor *view = kvs_src(g, node, 0), *v = kvs_cache_behind(p, g, view);
            if (!holds_values(g, v, k, view))
                kvs_not_known(g, node, "multiplies attention weights with something else than cached values");
            s->node = node;
            s->at = i;
            s->scale = before * after;
            s->softcap = capped ? after : 0;
            shape(g, s, kvs_src(g, product, 0), v, (uint32_t)kvs_ne(g, view)[1]);
            find_writes(p, g, s, v);
            kvs_plan_blank(p, g, node);
            return;
        } else {
            kvs_not_known(g, node, "stands between a query and its answer");
        }
    }
    kvs_not_known(g, product, "is compared with queries, and nothing is made of it");
}

/* What a context shift looks at: in libllama all cells, of each head all rows or some; in Ollama's engine some cells, whole. */
static bool rotated(struct kvs_ggml *g, struct kvs_step *s, const struct ggml_tensor *view)
{
    const int64_t *have = kvs_ne(g, view), *all = kvs_ne(g, s->k);
    const char *begin = g->get_data(s->k), *at = g->get_data(view);
    if (g->cache_heads) {
        s->first = first_cell(g, s, view, have[3]);
        s->visible = (uint32_t)have[2];
        return have[0] == all[0] && have[1] == all[1] && s->first + have[2] <= all[2];
    }
    s->visible = (uint32_t)(all[1] * all[2]);
    bool whole = have[0] * have[1] == all[0];
    bool rows = !s->hadamard && kvs_nb(g, view)[1] * (size_t)have[1] == kvs_nb(g, s->k)[1] && at >= begin &&
                at < begin + kvs_nb(g, view)[1];
    return (whole || rows) && have[2] == all[1] * all[2];
}

/* A context shift: ROPE over the cached keys, for quantised keys between two products with a Hadamard matrix. */
void kvs_step_rotation(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_tensor *node, const struct ggml_tensor *k,
                     const struct ggml_tensor *hadamard, int at)
{
    struct kvs_step *s = kvs_plan_add_step(p, KVS_STEP_ROTATE, node, at);
    s->k = k;
    s->hadamard = hadamard;
    if (kvs_is_values(g, k) || !rotated(g, s, kvs_src(g, node, 0)))
        kvs_not_known(g, node, "rotates a part of the cached keys");
}
