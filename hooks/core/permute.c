/*
 * Mode permute: finds the attention outputs of a graph and takes each through the enclave when it has been computed.
 *
 * The attention output of layer N is the tensor that is multiplied by `blk.N.attn_output.weight`. The weight's
 * name holds across engines and versions; names of nodes do not.
 */
#include "permute.h"

#include <stdlib.h>
#include <string.h>

/* The N of "blk.N.attn_output.weight", or -1. */
static long attention_layer(const char *name)
{
    if (memcmp(name, "blk.", 4) != 0)
        return -1;
    char *end;
    unsigned long layer = strtoul(name + 4, &end, 10);
    if (end == name + 4 || layer > 65535 || strcmp(end, ".attn_output.weight") != 0)
        return -1;
    return (long)layer;
}

static void add_target(struct kvs_inversion *s, struct ggml_tensor *t, uint32_t layer)
{
    if (s->count == s->capacity) {
        s->capacity = s->capacity ? 2 * s->capacity : 64;
        s->targets = realloc(s->targets, s->capacity * sizeof *s->targets);
        if (!s->targets)
            kvs_die("out of memory");
    }
    s->targets[s->count++] = (struct kvs_target){t, layer};
}

struct findings {
    struct kvs_model *model;
    bool marker_copied; /* the marker lies on another device than the graph reads it from */
    bool attention, cache, rope, alibi;
};

/*
 * The frequency factors of a shielded model are right for the rotary embedding that its file describes. A host may be told
 * to use another one (--rope-freq-base, --rope-scaling yarn): keys would be rotated wrongly.
 */
static void check_rope(const struct kvs_ggml *g, const struct ggml_tensor *node, const struct kvs_opened *info)
{
    struct kvs_rope r = kvs_rope_of(g, node);
    if (r.dims != (int32_t)info->rotary_dim || r.base != info->rotary_base || r.ext_factor != 0.0f)
        kvs_die("this engine was told to use another rotary embedding than its model's own (base %g over %d rows%s, the model "
                "has base %g over %u rows); leave out options such as --rope-freq-base and --rope-scaling yarn",
                (double)r.base, r.dims, r.ext_factor != 0.0f ? ", YaRN" : "", (double)info->rotary_base,
                info->rotary_dim);
}

/* A model without frequency factors of its own is known by a norm, that is by a factor of a product. */
static void look_for_norm(struct kvs_inversion *s, const struct ggml_tensor *node, struct findings *f)
{
    const struct ggml_tensor *norm = kvs_src(s->g, node, 1);
    if (!f->model && norm && kvs_model_is_marker(kvs_name(s->g, norm)))
        f->model = kvs_model_of_marker(s->g, norm);
}

static void look_for_marker(struct kvs_inversion *s, const struct ggml_tensor *node, struct findings *f)
{
    const struct ggml_tensor *factors = kvs_src(s->g, node, 2);
    const char *name = kvs_name(s->g, factors);
    if (kvs_model_is_marker(name)) {
        struct kvs_model *m = kvs_model_of_marker(s->g, factors);
        if (m && strcmp(s->g->op_desc(node), "ROPE") == 0)
            check_rope(s->g, node, &m->info);
        if (!f->model)
            f->model = m;
    } else if (strchr(name, '#')) {
        f->marker_copied = true;
    }
}

/* Whether the node reads or writes a tensor of the KV cache. */
static bool touches_cache(const struct kvs_ggml *g, const struct ggml_tensor *node)
{
    for (int i = 0; i < 3; i++) {
        const struct ggml_tensor *src = kvs_src(g, node, i);
        if (!src)
            break;
        if (kvs_is_cache(kvs_name(g, kvs_base(g, src))))
            return true;
    }
    return false;
}

static void look_at(struct kvs_inversion *s, const struct ggml_tensor *node, struct findings *f)
{
    const struct kvs_ggml *g = s->g;
    const struct ggml_tensor *weight = kvs_src(g, node, 0);
    if (!weight)
        return;
    long layer = attention_layer(kvs_name(g, weight));
    if (layer >= 0 && strcmp(g->op_desc(node), "MUL_MAT") == 0) {
        add_target(s, kvs_src(g, node, 1), (uint32_t)layer);
        return;
    }
    look_for_norm(s, node, f);
    if (kvs_src(g, node, 2))
        look_for_marker(s, node, f);
    if (!f->rope)
        f->rope = strcmp(g->op_desc(node), "ROPE") == 0;
    if (!f->cache)
        f->cache = touches_cache(g, node);
    if (!f->attention && kvs_src(g, node, 1)) {
        const char *op = g->op_desc(node);
        f->attention = strcmp(op, "FLASH_ATTN_EXT") == 0 || strcmp(op, "SOFT_MAX") == 0;
        f->alibi = f->attention && kvs_paramf(g, node, 1) != 0.0f; /* max_bias, in both */
    }
}

/*
 * When an attention output crosses from one device to another, the multiplication reads a copy that the
 * scheduler named "DEVICE#NAME#NUMBER". What has to be inverted is the original.
 */
static bool is_copy_of(const char *copy, const char *original)
{
    const char *start = strchr(copy, '#');
    const char *end = strrchr(copy, '#');
    size_t len = strlen(original);
    return start && end > start && (size_t)(end - start - 1) == len && memcmp(start + 1, original, len) == 0;
}

static void place_targets(struct kvs_inversion *s, struct ggml_cgraph *graph, int nodes)
{
    size_t placed = 0;
    for (int i = 0; i < nodes && placed < s->count; i++) {
        struct ggml_tensor *node = s->g->graph_node(graph, i);
        struct kvs_target *t = &s->targets[placed];
        if (node == t->tensor) {
            placed++;
        } else if (is_copy_of(kvs_name(s->g, t->tensor), kvs_name(s->g, node))) {
            t->tensor = node;
            placed++;
        }
    }
    if (placed != s->count)
        kvs_die("the attention output of layer %u is not where this hook can reach it (%s)",
                s->targets[placed].layer, kvs_name(s->g, s->targets[placed].tensor));
}

static void check_targets(const struct kvs_inversion *s)
{
    const struct kvs_opened *info = &s->model->info;
    for (size_t i = 0; i < s->count; i++) {
        const struct ggml_tensor *t = s->targets[i].tensor;
        if (s->targets[i].layer >= info->layers)
            kvs_die("the graph has a layer %u but the model has %u", s->targets[i].layer, info->layers);
        if (kvs_type(s->g, t) != KVS_GGML_TYPE_F32 || !s->g->is_contiguous(t) ||
            kvs_ne(s->g, t)[0] > (int64_t)info->row_floats)
            kvs_die("the attention output of layer %u has a shape that kvshield does not know", s->targets[i].layer);
    }
}

static void give_factors(struct kvs_inversion *s, struct ggml_cgraph *graph, const struct kvs_opened *info)
{
    for (int i = 0, n = s->g->graph_n_nodes(graph); i < n; i++) {
        struct ggml_tensor *node = s->g->graph_node(graph, i);
        if (strcmp(s->g->op_desc(node), "ROPE") == 0)
            kvs_factors_give(s->g, node, info);
    }
}

/* Whether the factors of a model go into its graphs; without a rotary embedding there are none. */
static bool factors_in_graph(const struct kvs_opened *info)
{
    return info->pair_count > 0 || info->rotary_dim == 0;
}

void kvs_permute_scan(struct kvs_inversion *s, struct ggml_cgraph *graph)
{
    struct findings f = {0};
    int nodes = s->g->graph_n_nodes(graph);
    s->count = s->next = 0;
    s->model = NULL;
    for (int i = 0; i < nodes; i++)
        look_at(s, s->g->graph_node(graph, i), &f);
    if (s->count == 0) {
        if (f.attention && f.cache)
            kvs_die("this engine computes attention in a way that kvshield does not know (ggml %s): "
                    "no node uses blk.N.attn_output.weight",
                    s->g->version());
        if (f.cache && f.rope) { /* a context shift */
            if (!s->last && kvs_models_in_graph())
                kvs_die("cached keys are rotated before the context has computed anything");
            if (s->last && factors_in_graph(&s->last->info))
                give_factors(s, graph, &s->last->info);
        }
        return;
    }
    if (!f.model && !f.cache) {
        s->count = 0; /* an embedding model: nothing of it is kept */
        return;
    }
    if (!f.model)
        kvs_die(f.marker_copied ? "the model's frequency factors lie on another device than its attention; "
                                  "put all layers on one device (-ngl 0 or -ngl 999)"
                                : "a graph with attention belongs to no model that kvshield has shielded");
    if (f.alibi && !f.model->info.fixed_heads)
        kvs_die("this model's attention has a bias that differs from head to head (ALiBi), which mode permute does not support: "
                "it moves heads; use --mode resident");
    s->model = s->last = f.model;
    if (factors_in_graph(&s->model->info))
        give_factors(s, graph, &s->model->info);
    place_targets(s, graph, nodes);
    check_targets(s);
    kvs_model_used(s->model);
}

struct rows {
    const struct kvs_ggml *g;
    struct ggml_tensor *tensor;
    size_t offset;
};

static void get_rows(void *user, void *rows, size_t bytes)
{
    const struct rows *r = user;
    r->g->tensor_get(r->tensor, rows, r->offset, bytes);
}

static void put_rows(void *user, const void *rows, size_t bytes)
{
    const struct rows *r = user;
    r->g->tensor_set(r->tensor, rows, r->offset, bytes);
}

void kvs_permute_invert(struct kvs_inversion *s)
{
    const struct kvs_target *t = &s->targets[s->next++];
    /* Layers may differ; a layer's weights, whose rows the enclave has checked, let no other length through. */
    uint32_t row_bytes = (uint32_t)kvs_ne(s->g, t->tensor)[0] * (uint32_t)sizeof(float);
    size_t left = s->g->nbytes(t->tensor) / row_bytes;
    uint32_t most = kvs_channel_rows(row_bytes);
    struct rows r = {s->g, t->tensor, 0};
    while (left > 0) {
        struct kvs_frame f = {s->model->info.model, t->layer, left < most ? (uint32_t)left : most, row_bytes};
        kvs_channel_transition(&f, get_rows, put_rows, &r);
        r.offset += (size_t)f.rows * row_bytes;
        left -= f.rows;
    }
}

bool kvs_permute_wants(const struct kvs_inversion *s, const struct ggml_tensor *t)
{
    return s->next < s->count && s->targets[s->next].tensor == t;
}

long kvs_permute_missing(const struct kvs_inversion *s)
{
    return s->next != s->count ? (long)s->targets[s->next].layer : -1;
}
