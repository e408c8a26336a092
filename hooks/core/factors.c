/*
 * Frequency factors for engines that have no place in the model's file for them, or compute their frequencies in more than one way: a
 * rotary embedding takes them as its third source, whatever the model is (ggml.h, ggml_rope_ext). The tensor must lie where the
 * device that computes the node can read it: one for each way of rotating and type of buffer, kept until the process ends,
 * because graphs that point to it are.
 */
#include "kvs.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct given {
    const void *caller;
    uint32_t model;
    void *type;
    struct kvs_rope rope;
    struct ggml_tensor *own; /* the model's factors for this way, or NULL */
    struct ggml_tensor *tensor;
    struct given *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct given *list;

static void read_own(const struct kvs_ggml *g, const struct ggml_tensor *own, float *out, size_t n)
{
    if (strchr(kvs_name(g, own), '#'))
        kvs_die("the model's frequency factors lie on another device than its attention; put all layers on one device (-ngl 0 or -ngl 999)");
    if (kvs_type(g, own) != KVS_GGML_TYPE_F32 || g->nbytes(own) != n * sizeof *out)
        kvs_die("the frequency factors %s are not one number for each of %zu rotary pairs", kvs_name(g, own), n);
    g->tensor_get(own, out, 0, n * sizeof *out);
}

static struct ggml_tensor *make(struct kvs_ggml *g, const struct given *want, const struct kvs_opened *info)
{
    float own[KVS_PAIRS_MAX], factors[KVS_PAIRS_MAX];
    size_t bytes = info->pair_count * sizeof *factors;
    if (want->own)
        read_own(g, want->own, own, info->pair_count);
    if (!kvs_rotary_factors(&want->rope, info->pairs, info->pair_count, want->own ? own : NULL, factors))
        kvs_die("the rotary embedding of this model (base %g) cannot be permuted: a frequency factor is out of range; "
                "use --mode resident",
                (double)want->rope.base);
    struct ggml_context *ctx = g->init((struct kvs_ggml_init_params){4096, NULL, true});
    struct ggml_tensor *t = ctx ? g->new_tensor_2d(ctx, KVS_GGML_TYPE_F32, (int64_t)info->pair_count, 1) : NULL;
    struct ggml_backend_buffer *buffer = t ? g->backend->alloc_buffer(want->type, bytes + 4096) : NULL;
    if (!buffer)
        kvs_die("no memory for the model's frequency factors");
    g->backend->tensor_alloc(buffer, t, g->backend->get_base(buffer));
    g->set_name(t, "kvshield-factors");
    g->tensor_set(t, factors, 0, bytes);
    return t;
}

static bool same_way(const struct given *a, const struct given *b)
{
    return a->caller == b->caller && a->model == b->model && a->type == b->type && a->own == b->own &&
           memcmp(&a->rope, &b->rope, sizeof a->rope) == 0;
}

/* The caller holds the lock. */
static struct ggml_tensor *factors_of(struct kvs_ggml *g, struct given *want, const struct kvs_opened *info)
{
    for (const struct given *f = list; f; f = f->next)
        if (f->tensor == want->own)
            want->own = f->own; /* an engine may run a graph again that was given its factors before */
    for (const struct given *f = list; f; f = f->next)
        if (same_way(f, want))
            return f->tensor;
    struct given *f = malloc(sizeof *f);
    if (!f)
        kvs_die("out of memory");
    *f = *want;
    f->tensor = make(g, want, info);
    f->next = list;
    list = f;
    return f->tensor;
}

void kvs_factors_give(struct kvs_ggml *g, struct ggml_tensor *rope, const struct kvs_opened *info)
{
    const char *missing = kvs_backend_find(g);
    if (missing)
        kvs_die("%s, which mode permute needs for this model", missing);
    struct ggml_backend_buffer *buffer = kvs_buffer(g, kvs_base(g, rope));
    if (!buffer)
        kvs_die("a rotary embedding (%s) has no memory before its graph is computed", kvs_name(g, rope));
    struct given want = {.caller = g->caller, .model = info->model, .type = g->backend->type_of(buffer), .rope = kvs_rope_of(g, rope)};
    if (want.rope.dims != (int32_t)info->rotary_dim || want.rope.mode & ~2)
        kvs_die("this engine rotates %d rows of a head in mode %d where %u rows and one position for all of them were expected; "
                "use --mode resident",
                want.rope.dims, want.rope.mode, info->rotary_dim);
    struct ggml_tensor **slot = (struct ggml_tensor **)(void *)((char *)rope + g->layout.src) + 2;
    want.own = *slot;
    pthread_mutex_lock(&lock);
    *slot = factors_of(g, &want, info);
    pthread_mutex_unlock(&lock);
}
