/*
 * Ollama's own engine reads a model in Go, past everything that could be wrapped, and hands its tensors over one piece after
 * another. A shielded model has holes where it is unchanged, which read as zeros: here they are filled from the original, so that
 * no copy of the whole is needed.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

extern struct gguf_context *__real_gguf_init_from_file(const char *, struct kvs_gguf_init_params);
extern size_t gguf_get_data_offset(const struct gguf_context *);
extern int64_t gguf_get_n_tensors(const struct gguf_context *);
extern int64_t gguf_find_tensor(const struct gguf_context *, const char *);
extern size_t gguf_get_tensor_offset(const struct gguf_context *, int64_t);
extern const char *gguf_get_tensor_name(const struct gguf_context *, int64_t);
extern int gguf_get_tensor_type(const struct gguf_context *, int64_t);

static struct kvs_model *model; /* with holes; set before the engine reads it */
static struct gguf_context *header;

/* Tensors that the engine changes between the file and the graph. */
static bool is_rewritten(int64_t i)
{
    enum { OLD_MXFP4 = 4, BF16 = KVS_GGML_TYPE_BF16 };
    const char *name = gguf_get_tensor_name(header, i), *end = strstr(name, "_exps.bias");
    int type = gguf_get_tensor_type(header, i);
    return type == OLD_MXFP4 || (type == BF16 && end && end[10] == 0);
}

bool kvs_link_weights(struct kvs_model *m)
{
    char path[64];
    kvs_model_path(m, path, sizeof path);
    header = __real_gguf_init_from_file(path, (struct kvs_gguf_init_params){.no_alloc = true});
    if (!header)
        return false;
    for (int64_t i = 0, n = gguf_get_n_tensors(header); i < n; i++)
        if (is_rewritten(i))
            return false;
    kvs_model_consumed(m);
    model = m;
    return true;
}

/* The tensor in the file: the engine copies some for each layer, and the embeddings where a model has no output of its own. */
static int64_t find(const char *name)
{
    int64_t i = gguf_find_tensor(header, name);
    if (i < 0 && strcmp(name, "output.weight") == 0)
        i = gguf_find_tensor(header, "token_embd.weight");
    size_t digits = strncmp(name, "blk.", 4) == 0 ? strspn(name + 4, "0123456789") : 0;
    if (i < 0 && digits > 0 && name[4 + digits] == '.')
        i = gguf_find_tensor(header, name + 5 + digits);
    return i;
}

static void read_original(uint8_t *to, size_t len, uint64_t from)
{
    for (ssize_t n; len > 0; to += n, len -= (size_t)n, from += (uint64_t)n) {
        n = pread(model->original, to, len, (off_t)from);
        if (n < 0 && errno == EINTR)
            n = 0;
        else if (n <= 0)
            kvs_die("the model's file cannot be read: %s", n < 0 ? strerror(errno) : "it has become shorter");
    }
}

/* Whether bytes that are set are a part of the model; *at is where they are in its file. */
static bool is_weight(struct kvs_ggml *g, const struct ggml_tensor *t, size_t offset, uint64_t *at)
{
    const char *name = kvs_name(g, t);
    if (!model || model->used || *name == 0 || strncmp(name, "leaf_", 5) == 0 || strncmp(name, "node_", 5) == 0)
        return false; /* an input of a graph */
    int64_t i = find(name);
    if (i < 0)
        kvs_die("this engine loads a tensor %s that is not in its model's file", name);
    *at = gguf_get_data_offset(header) + gguf_get_tensor_offset(header, i) + offset;
    return true;
}

void kvs_link_tensor_set(struct kvs_ggml *g, struct ggml_tensor *t, const void *data, size_t offset, size_t size)
{
    uint64_t at;
    if (!is_weight(g, t, offset, &at)) {
        kvs_entry_tensor_set(g, t, data, offset, size);
        return;
    }
    uint8_t *filled = malloc(size + 1);
    if (!filled)
        kvs_die("out of memory");
    memcpy(filled, data, size);
    for (size_t i = 0; i < model->info.overlays; i++) {
        const struct kvs_range *r = &model->info.overlay[i];
        uint64_t from = r->to > at ? r->to : at, to = r->to + r->length < at + size ? r->to + r->length : at + size;
        if (from < to)
            read_original(filled + (from - at), to - from, r->from + (from - r->to));
    }
    kvs_entry_tensor_set(g, t, filled, offset, size);
    free(filled);
}
