/*
 * struct ggml_tensor is public but its layout moves between versions. It is not assumed here: a small
 * graph with known shapes, sources and names is built with the engine's own functions, and the members
 * are searched for in it.
 */
#include "kvs.h"

#include <string.h>

enum { A_COLS = 37, A_ROWS = 41, B_ROWS = 43 };
static const size_t NOT_FOUND = (size_t)-1;

/* The offset of `want` in the `len` bytes at `object`, at the given alignment, from `from` on. */
static size_t find(const void *object, size_t len, const void *want, size_t want_len, size_t from)
{
    for (size_t at = from; at + want_len <= len; at += sizeof(void *))
        if (memcmp((const char *)object + at, want, want_len) == 0)
            return at;
    return NOT_FOUND;
}

/* The operation: 0 in a leaf, another number in each kind of node; set to 0, it makes a node one that computes nothing. */
static bool probe_op(struct kvs_ggml *g, struct ggml_tensor *leaf, struct ggml_tensor *node, struct ggml_tensor *view,
                     struct kvs_layout *l)
{
    for (size_t at = l->nb + 4 * sizeof(size_t); at + sizeof(int) <= l->src; at += sizeof(int)) {
        int *op = (int *)(void *)((char *)node + at), was = *op;
        if (was <= 0 || *(const int *)(const void *)((const char *)leaf + at) != 0 ||
            *(const int *)(const void *)((const char *)view + at) == was)
            continue;
        *op = 0;
        bool nothing = strcmp(g->op_desc(node), "NONE") == 0;
        *op = was;
        if (nothing) {
            l->op = at;
            return true;
        }
    }
    return false;
}

/* The flags of a tensor, among which the engine marks what a graph is computed for. */
static bool probe_flags(struct kvs_ggml *g, struct ggml_context *ctx, struct kvs_layout *l)
{
    struct ggml_tensor *x = g->new_tensor_2d(ctx, KVS_GGML_TYPE_F32, 4, 4);
    uint8_t before[512];
    size_t len = l->name < sizeof before ? l->name : sizeof before;
    if (!x)
        return false;
    memcpy(before, x, len);
    g->set_output(x);
    for (size_t at = 0; at + sizeof(int) <= len; at += sizeof(int)) {
        if (memcmp(before + at, (const char *)x + at, sizeof(int)) == 0)
            continue;
        l->flags = at;
        l->output = *(const int *)(const void *)((const char *)x + at);
        return true;
    }
    return false;
}

static bool probe(struct kvs_ggml *g, struct ggml_context *ctx, struct kvs_layout *l)
{
    struct ggml_tensor *a = g->new_tensor_2d(ctx, KVS_GGML_TYPE_F32, A_COLS, A_ROWS);
    struct ggml_tensor *b = g->new_tensor_2d(ctx, KVS_GGML_TYPE_F32, A_COLS, B_ROWS);
    struct ggml_tensor *c = a && b ? g->mul_mat(ctx, a, b) : NULL;
    struct ggml_tensor *v = c ? g->reshape_2d(ctx, c, B_ROWS, A_ROWS) : NULL;
    if (!v)
        return false;
    g->set_name(c, "kvshield-probe");
    const char *name = g->get_name(c);
    if (name < (const char *)c || name > (const char *)c + 1024 || strcmp(name, "kvshield-probe") != 0)
        return false;
    l->name = (size_t)(name - (const char *)c);

    /* All that is searched for lies before the name in every ggml seen, or right behind it. */
    size_t len = l->name;
    const struct ggml_tensor *sources[3] = {a, b, NULL};
    const int64_t shape[4] = {A_ROWS, B_ROWS, 1, 1};
    const size_t strides[4] = {4, 4 * A_ROWS, 4 * A_ROWS * B_ROWS, 4 * A_ROWS * B_ROWS};
    l->src = find(c, len, sources, sizeof sources, 0);
    l->ne = find(c, len, shape, sizeof shape, 0);
    l->nb = find(c, len, strides, sizeof strides, 0);
    l->type = 0;
    if (l->src == NOT_FOUND || l->ne == NOT_FOUND || l->nb == NOT_FOUND || !probe_op(g, a, c, v, l))
        return false;
    l->view_src = find(v, len, &c, sizeof c, l->src + sizeof sources);
    return l->view_src != NOT_FOUND && kvs_src(g, v, 0) == c;
}

/* Among the parameters of a rotary embedding, the base is found by a value that no other parameter has. */
static bool probe_rope(struct kvs_ggml *g, struct ggml_context *ctx, struct kvs_layout *l)
{
    const float base = 12345.0f, ext_factor = 0.625f;
    struct ggml_tensor *x = g->new_tensor_2d(ctx, KVS_GGML_TYPE_F32, 16, 3);
    struct ggml_tensor *positions = g->new_tensor_2d(ctx, KVS_GGML_TYPE_I32, 1, 1);
    struct ggml_tensor *r = x && positions ? g->rope_ext(ctx, x, positions, NULL, 8, 0, 64, base, 0.5f, ext_factor,
                                                         1.5f, 32.0f, 2.0f)
                                           : NULL;
    if (!r)
        return false;
    for (size_t at = 16; at + sizeof base <= l->name; at += sizeof base) {
        if (memcmp((const char *)r + at, &base, sizeof base) != 0)
            continue;
        l->rope_base = at;
        struct kvs_rope found = kvs_rope_of(g, r);
        return found.dims == 8 && found.original == 64 && found.base == base && found.scale == 0.5f &&
               found.ext_factor == ext_factor && found.attn_factor == 1.5f && found.beta_fast == 32.0f && found.beta_slow == 2.0f;
    }
    return false;
}

/* The offsets found must also hold for tensors they were not found in. */
static bool check(struct kvs_ggml *g, struct ggml_context *ctx)
{
    struct ggml_tensor *x = g->new_tensor_2d(ctx, KVS_GGML_TYPE_F32, 16, 3);
    struct ggml_tensor *y = g->new_tensor_2d(ctx, 1 /* F16 */, 16, 5);
    struct ggml_tensor *z = x && y ? g->mul_mat(ctx, y, x) : NULL;
    if (!z || strcmp(g->op_desc(z), "MUL_MAT") != 0)
        return false;
    g->set_name(y, "y");
    return kvs_type(g, x) == KVS_GGML_TYPE_F32 && kvs_type(g, y) == 1 && kvs_type(g, z) == KVS_GGML_TYPE_F32 &&
           kvs_src(g, z, 0) == y && kvs_src(g, z, 1) == x && kvs_src(g, z, 2) == NULL &&
           kvs_ne(g, z)[0] == 5 && kvs_ne(g, z)[1] == 3 && kvs_view_src(g, z) == NULL &&
           strcmp(kvs_name(g, y), "y") == 0;
}

bool kvs_layout_find(struct kvs_ggml *g)
{
    struct kvs_ggml_init_params params = {.mem_size = 64 * 1024, .no_alloc = true};
    struct ggml_context *ctx = g->init(params);
    if (!ctx)
        return false;
    bool ok = probe(g, ctx, &g->layout) && probe_rope(g, ctx, &g->layout) && probe_flags(g, ctx, &g->layout) && check(g, ctx);
    g->free(ctx);
    return ok;
}

size_t kvs_layout_pointer(const struct kvs_ggml *g, const struct ggml_tensor *t, const struct ggml_tensor *without,
                          const void *pointer)
{
    size_t at = find(t, g->layout.name, &pointer, sizeof pointer, 0);
    if (at == NOT_FOUND || find(t, g->layout.name, &pointer, sizeof pointer, at + sizeof pointer) != NOT_FOUND ||
        find(without, g->layout.name, &pointer, sizeof pointer, 0) != NOT_FOUND)
        return NOT_FOUND;
    return at;
}
