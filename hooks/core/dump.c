/*
 * A dump of what an engine's memory holds, for `kvshield audit`: the KV cache, layer 0's attention weights as they lie there,
 * and the compute buffers as the last graph left them. Read through ggml's own functions, so from any device. The supervisor
 * must have allowed dumps at the hello. What fails here ends the dump, not the process. The format: docs/protocol.md, section 5.
 */
#include "kvs.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define MAGIC 0x4453564bu /* "KVSD" */
#define VERSION 1
#define CHUNK ((size_t)16 << 20)
#define BUFFERS_MAX 64
#define TENSORS_MAX 4096

enum { END = 0, CACHE = 1, WEIGHT = 2, BUFFER = 3 };
enum { TRANSPOSED = 1 };

struct dump_header {
    uint32_t magic, version, flags, reserved;
};

struct record {
    uint32_t kind, type;
    int64_t ne[4];
    uint64_t bytes; /* that follow; 0 where they cannot be read */
    char name[64];
    uint64_t reserved[2];
};

/* One dump in progress. */
struct dump {
    struct kvs_ggml *g;
    int fd;
    bool failed;
    uint8_t *chunk;
    struct ggml_context *ctx; /* of the tensors that are laid over whole buffers */
    const struct ggml_tensor *tensors[TENSORS_MAX];
    size_t count;
    struct ggml_backend_buffer *buffers[BUFFERS_MAX];
    size_t buffer_count;
    bool flash, attention;
};

static void put(struct dump *d, const void *data, size_t len)
{
    const char *p = data;
    while (len > 0 && !d->failed) {
        ssize_t n = write(d->fd, p, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            d->failed = true;
            return;
        }
        p += n;
        len -= (size_t)n;
    }
}

/*
 * Weights that a CPU backend has rearranged for its kernels cannot be read back, and what is spread over several devices
 * only as a whole: ggml would end the process.
 */
static bool readable(const struct dump *d, struct ggml_backend_buffer *buffer)
{
    const struct kvs_backend *b = d->g->backend;
    if (!buffer)
        return false;
    const char *name = b->get_name(buffer);
    return b->is_host(buffer) || (strncmp(name, "CPU", 3) != 0 && strncmp(name, "AMX", 3) != 0 &&
                                  strncmp(name, "Meta", 4) != 0 && !strstr(name, "_Split"));
}

static void put_data(struct dump *d, const struct ggml_tensor *t, size_t bytes)
{
    for (size_t at = 0; at < bytes && !d->failed; at += CHUNK) {
        size_t n = bytes - at < CHUNK ? bytes - at : CHUNK;
        d->g->tensor_get(t, d->chunk, at, n);
        put(d, d->chunk, n);
    }
}

/* The shape of a cache as libllama has it, [floats, cells, streams], whatever the engine. */
static void cache_shape(const struct dump *d, bool values, int64_t ne[4])
{
    if (!d->g->cache_heads)
        return;
    int64_t first = ne[0], cells = ne[2];
    ne[0] = first * ne[1];
    if (values && !d->flash) { /* [cells, floats of a head, heads] */
        ne[0] = ne[1] * cells;
        cells = first;
    }
    ne[1] = cells;
    ne[2] = 1;
}

static void put_tensor(struct dump *d, const struct ggml_tensor *t)
{
    const char *name = kvs_name(d->g, t);
    struct record r = {.kind = kvs_is_cache(name) ? CACHE : WEIGHT, .type = (uint32_t)kvs_type(d->g, t)};
    memcpy(r.ne, kvs_ne(d->g, t), sizeof r.ne);
    if (r.kind == CACHE)
        cache_shape(d, name[6] == 'v', r.ne);
    memcpy(r.name, name, strnlen(name, sizeof r.name - 1));
    if (readable(d, kvs_buffer(d->g, t)) && d->g->is_contiguous(t))
        r.bytes = d->g->nbytes(t);
    put(d, &r, sizeof r);
    put_data(d, t, r.bytes);
}

static void put_buffer(struct dump *d, struct ggml_backend_buffer *buffer)
{
    const struct kvs_backend *b = d->g->backend;
    struct record r = {.kind = BUFFER, .type = KVS_GGML_TYPE_I8};
    const char *name = b->get_name(buffer);
    memcpy(r.name, name, strnlen(name, sizeof r.name - 1));
    struct ggml_tensor *whole = NULL;
    r.ne[0] = (int64_t)b->get_size(buffer);
    r.ne[1] = r.ne[2] = r.ne[3] = 1;
    if (readable(d, buffer))
        whole = d->g->new_tensor_2d(d->ctx, KVS_GGML_TYPE_I8, r.ne[0], 1);
    if (whole) {
        b->tensor_alloc(buffer, whole, b->get_base(buffer));
        r.bytes = (uint64_t)r.ne[0];
    }
    put(d, &r, sizeof r);
    if (whole)
        put_data(d, whole, r.bytes);
}

static bool is_wanted_weight(const char *name)
{
    static const char *const names[] = {"blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight",
                                        "blk.0.attn_qkv.weight"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0)
            return true;
    return false;
}

static void want_tensor(struct dump *d, const struct ggml_tensor *t)
{
    const char *name = kvs_name(d->g, t);
    if (!kvs_is_cache(name) && !is_wanted_weight(name))
        return;
    for (size_t i = 0; i < d->count; i++)
        if (d->tensors[i] == t)
            return;
    if (d->count < TENSORS_MAX)
        d->tensors[d->count++] = t;
}

static void want_buffer(struct dump *d, const struct ggml_tensor *node)
{
    struct ggml_backend_buffer *buffer = kvs_buffer(d->g, node);
    if (!buffer || kvs_view_src(d->g, node))
        return;
    for (size_t i = 0; i < d->buffer_count; i++)
        if (d->buffers[i] == buffer)
            return;
    if (d->buffer_count < BUFFERS_MAX)
        d->buffers[d->buffer_count++] = buffer;
}

/* Names what there is to dump; false for a graph without attention, such as one that shifts the positions in a cache. */
static bool survey(struct dump *d, struct ggml_cgraph *graph)
{
    bool cache = false;
    for (int i = 0, n = d->g->graph_n_nodes(graph); i < n; i++) {
        struct ggml_tensor *node = d->g->graph_node(graph, i);
        const char *op = d->g->op_desc(node);
        d->flash |= strcmp(op, "FLASH_ATTN_EXT") == 0;
        d->attention |= d->flash || strcmp(op, "SOFT_MAX") == 0;
        for (int j = 0; j < 4; j++) {
            const struct ggml_tensor *src = kvs_src(d->g, node, j);
            if (!src)
                break;
            want_tensor(d, kvs_base(d->g, src));
        }
    }
    for (size_t i = 0; i < d->count; i++)
        cache |= kvs_is_cache(kvs_name(d->g, d->tensors[i]));
    return cache && d->attention;
}

static const char *write_dump(struct dump *d, void *sched, struct ggml_cgraph *graph)
{
    d->g->backend->synchronize(sched);
    for (int i = 0, n = d->g->graph_n_nodes(graph); i < n; i++)
        want_buffer(d, d->g->graph_node(graph, i));
    struct dump_header h = {MAGIC, VERSION, d->flash ? 0 : TRANSPOSED, 0};
    struct record end = {.kind = END};
    put(d, &h, sizeof h);
    for (size_t i = 0; i < d->count; i++)
        put_tensor(d, d->tensors[i]);
    for (size_t i = 0; i < d->buffer_count; i++)
        put_buffer(d, d->buffers[i]);
    put(d, &end, sizeof end);
    return d->failed ? "the dump could not be written to its file" : NULL;
}

/* A write beyond the process's limit would raise SIGXFSZ, which ends it. */
static bool files_are_limited(void)
{
    struct rlimit limit;
    return getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
}

/* NULL, or why there is no dump. */
static const char *make(struct dump *d, void *sched, struct ggml_cgraph *graph)
{
    static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER; /* dump at a time: the engine may compute on several threads */
    if (files_are_limited())
        return "the size of this process's files is limited (ulimit -f)";
    const char *refusal = "out of memory";
    d->chunk = malloc(CHUNK);
    d->ctx = d->g->init((struct kvs_ggml_init_params){(size_t)256 << 10, NULL, true});
    pthread_mutex_lock(&one);
    if (d->chunk && d->ctx)
        refusal = kvs_backend_find(d->g);
    if (!refusal)
        refusal = write_dump(d, sched, graph);
    pthread_mutex_unlock(&one);
    if (d->ctx)
        d->g->free(d->ctx);
    free(d->chunk);
    return refusal;
}

void kvs_dump(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph)
{
    if (!kvs_session_dump_wanted())
        return;
    struct dump *d = calloc(1, sizeof *d);
    if (!d)
        return; /* the next graph will do */
    d->g = g;
    struct kvs_dump_request request;
    if (survey(d, graph) && kvs_session_take_dump(&request)) {
        d->fd = request.fd;
        const char *refusal = make(d, sched, graph);
        close(request.fd);
        kvs_session_dumped(request.number, refusal);
    }
    free(d);
}
