/* Functions of ggml's backends that not every run needs, and where a tensor names its buffer. */
#include "kvs.h"

#include <stdlib.h>

static bool probe_buffer(struct kvs_ggml *g, struct kvs_backend *b, struct ggml_context *ctx)
{
    struct ggml_tensor *placed = g->new_tensor_2d(ctx, KVS_GGML_TYPE_I8, 64, 1);
    struct ggml_tensor *other = g->new_tensor_2d(ctx, KVS_GGML_TYPE_I8, 64, 1);
    struct ggml_backend_buffer *buffer = placed && other ? b->alloc_buffer(b->cpu_type(), 4096) : NULL;
    if (!buffer)
        return false;
    b->tensor_alloc(buffer, placed, b->get_base(buffer));
    b->buffer = kvs_layout_pointer(g, placed, other, buffer);
    b->free_buffer(buffer);
    return b->buffer != (size_t)-1;
}

static void resolve(struct kvs_ggml *g, struct kvs_backend *b)
{
    static const struct {
        const char *name;
        size_t member;
    } functions[] = {
        {"ggml_backend_buffer_get_base", offsetof(struct kvs_backend, get_base)},
        {"ggml_backend_buffer_get_size", offsetof(struct kvs_backend, get_size)},
        {"ggml_backend_buffer_name", offsetof(struct kvs_backend, get_name)},
        {"ggml_backend_buffer_is_host", offsetof(struct kvs_backend, is_host)},
        {"ggml_backend_tensor_alloc", offsetof(struct kvs_backend, tensor_alloc)},
        {"ggml_backend_buft_alloc_buffer", offsetof(struct kvs_backend, alloc_buffer)},
        {"ggml_backend_buffer_free", offsetof(struct kvs_backend, free_buffer)},
        {"ggml_backend_cpu_buffer_type", offsetof(struct kvs_backend, cpu_type)},
        {"ggml_backend_buffer_get_type", offsetof(struct kvs_backend, type_of)},
        {"ggml_backend_sched_synchronize", offsetof(struct kvs_backend, synchronize)},
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        void *f = g->find ? g->find(g, functions[i].name) : NULL;
        if (!f)
            snprintf(b->missing, sizeof b->missing, "this engine's ggml has no function %s",
                     functions[i].name);
        memcpy((char *)b + functions[i].member, &f, sizeof f);
    }
}

const char *kvs_backend_find(struct kvs_ggml *g)
{
    if (!g->backend) {
        struct ggml_context *ctx = g->init((struct kvs_ggml_init_params){8192, NULL, true});
        struct kvs_backend *b = calloc(1, sizeof *b);
        if (!b || !ctx)
            return "out of memory";
        resolve(g, b);
        if (!b->missing[0] && !probe_buffer(g, b, ctx))
            snprintf(b->missing, sizeof b->missing, "a tensor of this engine's ggml (%s) does not tell in which buffer it lies",
                     g->version());
        g->free(ctx);
        g->backend = b;
    }
    return g->backend->missing[0] ? g->backend->missing : NULL;
}
