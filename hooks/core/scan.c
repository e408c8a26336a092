/*
 * Reads a graph for mode resident: every node that touches a KV cache must be one of a few known ones, or the process ends before
 * the graph runs. Nothing goes by the model's architecture or by names of nodes; only the caches' own names
 * (cache_k_lN, cache_v_lN) are relied on.
 */
#include "plan.h"

#include <stdlib.h>

/*
 * The scheduler's copy of a look at a cache, on another device ("DEVICE#cache_k_lN (view)#M"): the cache that this graph writes
 * under that name. The copy is made of zeros.
 */
static const struct ggml_tensor *cache_copied(const struct kvs_plan *p, struct kvs_ggml *g, const char *name)
{
    const char *inner = strchr(name, '#');
    if (!inner || (strncmp(inner, "#cache_k_l", 10) != 0 && strncmp(inner, "#cache_v_l", 10) != 0))
        return NULL;
    size_t len = 9 + strspn(++inner + 9, "0123456789");
    for (size_t i = 0; i < p->write_count; i++) {
        const char *known = kvs_name(g, p->writes[i].cache);
        if (strncmp(known, inner, len) == 0 && known[len] == 0)
            return p->writes[i].cache;
    }
    kvs_die("a cache is moved between devices (%s) by a graph that does not write it", name);
}

static _Noreturn void other_state(const char *name)
{
    kvs_die("this model keeps another state than keys and values (%s), which mode resident cannot keep: it would hold the "
            "conversation in clear; use another model",
            name);
}

/* What a graph writes into a tensor that nothing computes is there for the next graph, whatever it is called. */
static void check_destination(struct kvs_ggml *g, const struct ggml_tensor *node)
{
    const struct ggml_tensor *base = kvs_base(g, node);
    if (base != node && kvs_op(g, base) == KVS_OP_NOTHING && !kvs_src(g, base, 0) && !kvs_is_cache(kvs_name(g, base)))
        other_state(kvs_name(g, base));
}

/* The cache that a tensor is a look at, or a copy of in another type or order; NULL for any other. */
static const struct ggml_tensor *cache_behind(const struct kvs_plan *p, struct kvs_ggml *g, const struct ggml_tensor *t)
{
    for (int depth = 0; t && depth < 16; depth++) {
        const struct ggml_tensor *base = kvs_base(g, t);
        const char *name = kvs_name(g, base);
        if (kvs_is_cache(name))
            return base;
        if (strncmp(name, "cache_", 6) == 0 && !strchr(name, ' '))
            other_state(name);
        const struct ggml_tensor *copied = cache_copied(p, g, name);
        if (copied)
            return copied;
        enum kvs_op op = kvs_op(g, t);
        if (op != KVS_OP_COPY && op != KVS_OP_NOTHING)
            return NULL;
        t = kvs_src(g, t, 0);
    }
    return NULL;
}

static bool is_values(struct kvs_ggml *g, const struct ggml_tensor *cache)
{
    return kvs_name(g, cache)[6] == 'v';
}

static _Noreturn void not_known(struct kvs_ggml *g, const struct ggml_tensor *node, const char *what)
{
    kvs_die("this engine uses its KV cache in a way that mode resident does not know: %s (%s) %s (%s, ggml %s); use --mode "
            "permute, or another model",
            kvs_name(g, node), g->op_desc(node), what, kvs_architectures(), g->version());
}

static void blank(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_tensor *node)
{
    p->blanks = kvs_plan_more(p->blanks, p->blank_count, &p->blank_capacity, sizeof *p->blanks);
    p->blanks[p->blank_count].node = node;
    p->blanks[p->blank_count++].op = *kvs_op_of(g, node);
}

static void add_write(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_tensor *node, const struct ggml_tensor *cache, int at)
{
    p->writes = kvs_plan_more(p->writes, p->write_count, &p->write_capacity, sizeof *p->writes);
    p->writes[p->write_count++] = (struct kvs_write){.node = node,
                                                     .cache = cache,
                                                     .source = kvs_src(g, node, 0),
                                                     .cells = kvs_src(g, node, 1),
                                                     .values = is_values(g, cache),
                                                     .at = at};
    blank(p, g, node);
}

static struct kvs_write *write_of(struct kvs_plan *p, const struct ggml_tensor *cache)
{
    for (size_t i = p->write_count; i-- > 0;)
        if (p->writes[i].cache == cache)
            return &p->writes[i];
    return NULL;
}

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
        not_known(g, s->node, "looks at a part of a cell");
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
        not_known(g, s->node, "has queries that do not fit its keys");
    s->first = first_cell(g, s, kview, streams);
    s->visible = (uint32_t)k[1];
    if (s->first + k[1] > cells)
        not_known(g, s->node, "looks at cells behind the last one");
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
        not_known(g, w->node, "writes something else than this layer's heads");
    w->floats = (uint32_t)(all / tokens);
}

static void find_writes(struct kvs_plan *p, struct kvs_ggml *g, struct kvs_step *s, const struct ggml_tensor *v)
{
    struct kvs_write *keys = write_of(p, s->k), *values = v == s->k ? keys : write_of(p, v);
    if (!keys || !values)
        not_known(g, s->node, "reads a cache that this graph does not write");
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
    if (!cache || is_values(g, cache))
        return cache != NULL;
    for (int depth = 0; depth < 16 && kvs_op(g, view) == KVS_OP_COPY; depth++)
        view = kvs_src(g, view, 0);
    return cache == k && kvs_ne(g, view)[2] == 1 && g->get_data(view) == g->get_data(k);
}

static void flash(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_tensor *node, const struct ggml_tensor *k, int at)
{
    const struct ggml_tensor *v = cache_behind(p, g, kvs_src(g, node, 2));
    if (is_values(g, k) || !holds_values(g, v, k, kvs_src(g, node, 2)))
        not_known(g, node, "reads values from somewhere else than a cache");
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
    blank(p, g, node);
}

/*
 * Attention without FLASH_ATTN_EXT: MUL_MAT(K, Q), perhaps soft-capped by SCALE, TANH, SCALE, then SOFT_MAX, then MUL_MAT(V, .).
 */
static void plain(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_cgraph *graph, const struct ggml_tensor *k, int at)
{
    struct ggml_tensor *product = g->graph_node(graph, at), *tip = product;
    struct kvs_step *s = kvs_plan_add_step(p, KVS_STEP_ATTEND, product, at);
    float before = 1, after = 1;
    bool capped = false, softened = false;
    s->k = k;
    s->q = kvs_src(g, product, 1);
    s->scale = 1;
    blank(p, g, product);
    for (int i = at + 1, n = g->graph_n_nodes(graph); i < n; i++) {
        struct ggml_tensor *node = g->graph_node(graph, i);
        enum kvs_op op = kvs_op(g, node);
        if (kvs_src(g, node, 0) != tip && kvs_src(g, node, 1) != tip)
            continue;
        if (op == KVS_OP_NOTHING) {
            tip = node;
        } else if (op == KVS_OP_SCALE && !softened && kvs_paramf(g, node, 1) == 0.0f) {
            *(capped ? &after : &before) *= kvs_paramf(g, node, 0);
            blank(p, g, tip = node);
        } else if (!softened && !capped && strcmp(g->op_desc(node), "TANH") == 0) {
            capped = true;
            blank(p, g, tip = node);
        } else if (op == KVS_OP_SOFT_MAX && !softened) {
            softened = true;
            s->mask = kvs_src(g, node, 1);
            s->sinks = kvs_src(g, node, 2);
            after *= kvs_paramf(g, node, 0);
            s->max_bias = kvs_paramf(g, node, 1);
            blank(p, g, tip = node);
        } else if (op == KVS_OP_MUL_MAT && softened) {
            const struct ggml_tensor *view = kvs_src(g, node, 0), *v = cache_behind(p, g, view);
            if (!holds_values(g, v, k, view))
                not_known(g, node, "multiplies attention weights with something else than cached values");
            s->node = node;
            s->at = i;
            s->scale = before * after;
            s->softcap = capped ? after : 0;
            shape(g, s, kvs_src(g, product, 0), v, (uint32_t)kvs_ne(g, view)[1]);
            find_writes(p, g, s, v);
            blank(p, g, node);
            return;
        } else {
            not_known(g, node, "stands between a query and its answer");
        }
    }
    not_known(g, product, "is compared with queries, and nothing is made of it");
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
static void rotation(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_tensor *node, const struct ggml_tensor *k,
                     const struct ggml_tensor *hadamard, int at)
{
    struct kvs_step *s = kvs_plan_add_step(p, KVS_STEP_ROTATE, node, at);
    s->k = k;
    s->hadamard = hadamard;
    if (is_values(g, k) || !rotated(g, s, kvs_src(g, node, 0)))
        not_known(g, node, "rotates a part of the cached keys");
}

struct scan {
    struct kvs_ggml *g;
    struct kvs_plan *p;
    struct ggml_cgraph *graph;
    bool shifts; /* the graph turns cached keys */
    /* the last product of a matrix with cached keys */
    const struct ggml_tensor *product, *product_of, *matrix;
};

static const struct ggml_tensor *product_behind(struct scan *c, const struct ggml_tensor *t)
{
    for (int depth = 0; t && depth < 16; depth++) {
        if (t == c->product)
            return c->product_of;
        if (kvs_op(c->g, t) != KVS_OP_NOTHING)
            return NULL;
        t = kvs_src(c->g, t, 0);
    }
    return NULL;
}

/* A node that does something with a cache other than SET_ROWS. */
static void with_cache(struct scan *c, struct ggml_tensor *node, int source, const struct ggml_tensor *cache, int at)
{
    struct kvs_ggml *g = c->g;
    switch (kvs_op(g, node)) {
    case KVS_OP_FLASH:
        flash(c->p, g, node, cache, at);
        return;
    case KVS_OP_MUL_MAT:
        if (source == 0 && !is_values(g, cache)) {
            plain(c->p, g, c->graph, cache, at);
            return;
        }
        if (source == 1 && !is_values(g, cache)) {
            c->product = node;
            c->product_of = cache;
            c->matrix = kvs_src(g, node, 0);
            return;
        }
        break;
    case KVS_OP_ROPE:
        rotation(c->p, g, node, cache, NULL, at);
        c->shifts = true;
        return;
    case KVS_OP_COPY:
        if (!kvs_is_cache(kvs_name(g, kvs_base(g, node)))) {
            blank(c->p, g, node); /* in another type or order, for an attention that will not happen */
            return;
        }
        if (c->shifts)
            return; /* zeros back into the cache, behind a rotation */
        break;
    default:
        break;
    }
    not_known(g, node, "touches it");
}

/* The first source of a node that is, or comes from, a cache. */
static const struct ggml_tensor *cache_among(const struct kvs_plan *p, struct kvs_ggml *g, const struct ggml_tensor *node, int *source)
{
    for (int j = 0; j < KVS_GGML_MAX_SRC; j++) {
        const struct ggml_tensor *src = kvs_src(g, node, j);
        const struct ggml_tensor *cache = src ? cache_behind(p, g, src) : NULL;
        if (cache) {
            *source = j;
            return cache;
        }
    }
    return NULL;
}

/* Whether a node is understood already, as a part of an attention further up or as a write. */
static bool is_understood(const struct kvs_plan *p, const struct ggml_tensor *node)
{
    for (size_t i = p->blank_count; i-- > 0;)
        if (p->blanks[i].node == node)
            return true;
    return false;
}

static void look_at(struct scan *c, int at)
{
    struct kvs_ggml *g = c->g;
    struct ggml_tensor *node = g->graph_node(c->graph, at);
    if (kvs_op(g, node) == KVS_OP_NOTHING)
        return;
    if (kvs_op(g, node) == KVS_OP_SET_ROWS || kvs_op(g, node) == KVS_OP_COPY)
        check_destination(g, node);
    int source;
    const struct ggml_tensor *cache = cache_among(c->p, g, node, &source);
    if (cache) {
        if (!is_understood(c->p, node))
            with_cache(c, node, source, cache, at);
    } else if (kvs_op(g, node) == KVS_OP_ROPE && c->product && (cache = product_behind(c, kvs_src(g, node, 0)))) {
        rotation(c->p, g, node, cache, c->matrix, at);
        c->shifts = true;
    } else if (!c->p->tokens && kvs_src(g, node, 1) && strncmp(kvs_name(g, kvs_src(g, node, 0)), "token_embd", 10) == 0) {
        c->p->tokens = kvs_src(g, node, 1);
    }
}

static void find_slots(struct kvs_plan *p, struct kvs_ggml *g)
{
    for (size_t i = 0; i < p->count; i++) {
        struct kvs_step *s = &p->steps[i];
        if (s->kind != KVS_STEP_ATTEND)
            continue;
        const struct ggml_tensor *cells = s->cells_of->cells;
        const int64_t *q = kvs_ne(g, s->q);
        size_t j = 0;
        while (j < p->slot_count && (p->slots[j].mask != s->mask || p->slots[j].cells != cells))
            j++;
        if (j == KVS_SLOTS)
            kvs_die("a graph has more than %d masks over its caches", KVS_SLOTS);
        if (j == p->slot_count)
            p->slots[p->slot_count++] = (struct kvs_slot){.mask = s->mask,
                                                          .cells = cells,
                                                          .tokens = (uint32_t)(q[1] * q[3]),
                                                          .blocks = (uint32_t)q[3],
                                                          .first = s->first,
                                                          .visible = s->visible};
        s->slot = (uint32_t)j;
        if (kvs_ne(g, cells)[0] != q[1] * q[3] || p->slots[j].tokens != (uint32_t)(q[1] * q[3]) || p->slots[j].visible != s->visible ||
            p->slots[j].first != s->first)
            not_known(g, s->node, "has another number of queries than of keys");
    }
}

/* Every write must have been taken by an attention: else rows would be lost. */
static void check_writes(struct kvs_plan *p, struct kvs_ggml *g)
{
    for (size_t i = 0; i < p->write_count; i++)
        if (!p->writes[i].taken)
            not_known(g, p->writes[i].node, "writes what no attention reads");
}

bool kvs_resident_scan(struct kvs_ggml *g, struct ggml_cgraph *graph, struct kvs_plan **plan)
{
    const char *missing = kvs_backend_find(g);
    if (missing)
        kvs_die("%s, which mode resident needs", missing);
    if (!*plan && !(*plan = calloc(1, sizeof **plan)))
        kvs_die("out of memory");
    struct kvs_plan *p = *plan;
    kvs_plan_forget(p);
    p->write_count = p->count = p->next = p->blank_count = p->slot_count = 0;
    p->tokens = NULL;
    struct scan c = {.g = g, .p = p, .graph = graph};
    /* `writes` may move while it grows: all of them are found before an attention points to one. */
    for (int i = 0, n = g->graph_n_nodes(graph); i < n; i++) {
        struct ggml_tensor *node = g->graph_node(graph, i);
        const struct ggml_tensor *cache =
            kvs_op(g, node) == KVS_OP_SET_ROWS ? kvs_base(g, node) : NULL;
        if (cache && kvs_is_cache(kvs_name(g, cache)))
            add_write(p, g, node, cache, i);
    }
    for (int i = 0, n = g->graph_n_nodes(graph); i < n; i++)
        look_at(&c, i);
    if (c.shifts && p->write_count == 0)
        p->blank_count = 0; /* its copies are of zeros, and what goes back into the cache must be */
    check_writes(p, g);
    find_slots(p, g);
    return p->count > 0;
}
