/*
 * Frequency factors for architectures that have none of their own: a rotary embedding takes them as its third source, whatever the
 * model is (ggml.h, ggml_rope_ext). The tensor must lie where the device that computes the node can read it: one for each model
 * and type of buffer, kept until the process ends, because graphs that point to it are.
 */
#include "kvs.h"

#include <pthread.h>
#include <stdlib.h>

struct given {
    const void *caller;
    uint32_t model;
    void *type;
    struct ggml_tensor *tensor;
    struct given *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct given *list;

static struct ggml_tensor *make(struct kvs_ggml *g, void *type, const struct kvs_opened *info)
{
    size_t bytes = info->factor_count * sizeof *info->factors;
    struct ggml_context *ctx = g->init((struct kvs_ggml_init_params){4096, NULL, true});
    struct ggml_tensor *t = ctx ? g->new_tensor_2d(ctx, KVS_GGML_TYPE_F32, (int64_t)info->factor_count, 1) : NULL;
    struct ggml_backend_buffer *buffer = t ? g->backend->alloc_buffer(type, bytes + 4096) : NULL;
    if (!buffer)
        kvs_die("no memory for the model's frequency factors");
    g->backend->tensor_alloc(buffer, t, g->backend->get_base(buffer));
    g->set_name(t, "kvshield-factors");
    g->tensor_set(t, info->factors, 0, bytes);
    return t;
}

static struct ggml_tensor *factors_of(struct kvs_ggml *g, void *type, const struct kvs_opened *info)
{
    pthread_mutex_lock(&lock);
    struct given *f = list;
    while (f && !(f->caller == g->caller && f->model == info->model && f->type == type))
        f = f->next;
    if (!f) {
        f = malloc(sizeof *f);
        if (!f)
            kvs_die("out of memory");
        *f = (struct given){g->caller, info->model, type, make(g, type, info), list};
        list = f;
    }
    pthread_mutex_unlock(&lock);
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
    struct ggml_tensor **slot = (struct ggml_tensor **)(void *)((char *)rope + g->layout.src) + 2, *ours;
    ours = factors_of(g, g->backend->type_of(buffer), info);
    if (*slot && *slot != ours)
        kvs_die("this model has frequency factors of its own (%s) where kvshield expects none", kvs_name(g, *slot));
    *slot = ours;
}
