/*
 * Reads a graph for mode resident: every node that touches a KV cache must be one of a few known ones, or the process ends before
 * the graph runs. Nothing goes by the model's architecture or by names of nodes; only the caches' own names
 * (cache_k_lN, cache_v_lN) are relied on.
 */
#include "scan.h"

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
const struct ggml_tensor *kvs_cache_behind(const struct kvs_plan *p, struct kvs_ggml *g, const struct ggml_tensor *t)
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

bool kvs_is_values(struct kvs_ggml *g, const struct ggml_tensor *cache)
{
    return kvs_name(g, cache)[6] == 'v';
}

_Noreturn void kvs_not_known(struct kvs_ggml *g, const struct ggml_tensor *node, const char *what)
{
    kvs_die("this engine uses its KV cache in a way that mode resident does not know: %s (%s) %s (%s, ggml %s); use --mode "
            "permute, or another model",
            kvs_name(g, node), g->op_desc(node), what, kvs_architectures(), g->version());
}

void kvs_plan_blank(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_tensor *node)
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
                                                     .values = kvs_is_values(g, cache),
                                                     .at = at};
    kvs_plan_blank(p, g, node);
}

struct kvs_write *kvs_write_of(struct kvs_plan *p, const struct ggml_tensor *cache)
{
    for (size_t i = p->write_count; i-- > 0;)
        if (p->writes[i].cache == cache)
            return &p->writes[i];
    return NULL;
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
        kvs_step_flash(c->p, g, node, cache, at);
        return;
    case KVS_OP_MUL_MAT:
        if (source == 0 && !kvs_is_values(g, cache)) {
            kvs_step_plain(c->p, g, c->graph, cache, at);
            return;
        }
        if (source == 1 && !kvs_is_values(g, cache)) {
            c->product = node;
            c->product_of = cache;
            c->matrix = kvs_src(g, node, 0);
            return;
        }
        break;
    case KVS_OP_ROPE:
        kvs_step_rotation(c->p, g, node, cache, NULL, at);
        c->shifts = true;
        return;
    case KVS_OP_COPY:
        if (!kvs_is_cache(kvs_name(g, kvs_base(g, node)))) {
            kvs_plan_blank(c->p, g, node); /* in another type or order, for an attention that will not happen */
            return;
        }
        if (c->shifts)
            return; /* zeros back into the cache, behind a rotation */
        break;
    default:
        break;
    }
    kvs_not_known(g, node, "touches it");
}

/* The first source of a node that is, or comes from, a cache. */
static const struct ggml_tensor *cache_among(const struct kvs_plan *p, struct kvs_ggml *g, const struct ggml_tensor *node, int *source)
{
    for (int j = 0; j < KVS_GGML_MAX_SRC; j++) {
        const struct ggml_tensor *src = kvs_src(g, node, j);
        const struct ggml_tensor *cache = src ? kvs_cache_behind(p, g, src) : NULL;
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
        kvs_step_rotation(c->p, g, node, cache, c->matrix, at);
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
            kvs_not_known(g, s->node, "has another number of queries than of keys");
    }
}

/* Every write must have been taken by an attention: else rows would be lost. */
static void check_writes(struct kvs_plan *p, struct kvs_ggml *g)
{
    for (size_t i = 0; i < p->write_count; i++)
        if (!p->writes[i].taken)
            kvs_not_known(g, p->writes[i].node, "writes what no attention reads");
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
