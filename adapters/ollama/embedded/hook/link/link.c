/*
 * The link-time build of the hook, for programs that carry ggml inside: the linker's --wrap hands calls between the objects of one
 * program to kvshield first. Nothing is looked up at run time.
 */
#define _GNU_SOURCE
#include "link.h"
#include "engine.h"
#include "entry.h"
#include "flavour.h"
#include "record.h"

#include <pthread.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>
#include <fcntl.h>
#include <errno.h>

static enum kvs_link_engine engine = KVS_LINK_NONE;

static void (*watcher)(void);

void kvs_link_watch(void (*look)(void))
{
    watcher = look;
}

void kvs_link_keep(const void *keys, const uint32_t *cells)
{
    const struct kvs_cache *c = kvs_cache_of(keys);
    if (c)
        kvs_cells_keep(c, cells);
}

void kvs_link_is(enum kvs_link_engine e)
{
    engine = e;
}

bool kvs_link_shields(void)
{
    return engine == KVS_LINK_LLAMA || engine == KVS_LINK_OLLAMA;
}

/* ggml's functions, by address only; where the linker wraps one, the real one. */
#define PLAIN(X)                                                                                   \
    X(init, ggml_init)                                                                             \
    X(free, ggml_free)                                                                             \
    X(new_tensor_2d, ggml_new_tensor_2d)                                                           \
    X(mul_mat, ggml_mul_mat)                                                                       \
    X(rope_ext, ggml_rope_ext)                                                                     \
    X(reshape_2d, ggml_reshape_2d)                                                                 \
    X(get_name, ggml_get_name)                                                                     \
    X(set_name, ggml_set_name)                                                                     \
    X(op_desc, ggml_op_desc)                                                                       \
    X(nbytes, ggml_nbytes)                                                                         \
    X(set_output, ggml_set_output)                                                                 \
    X(get_data, ggml_get_data)                                                                     \
    X(is_contiguous, ggml_is_contiguous)                                                           \
    X(graph_n_nodes, ggml_graph_n_nodes)                                                           \
    X(graph_node, ggml_graph_node)                                                                 \
    X(tensor_get, __real_ggml_backend_tensor_get)                                                  \
    X(tensor_set, __real_ggml_backend_tensor_set)                                                  \
    X(set_eval_callback, __real_ggml_backend_sched_set_eval_callback)                              \
    X(graph_compute_async, __real_ggml_backend_sched_graph_compute_async)                          \
    X(sched_alloc, __real_ggml_backend_sched_alloc_graph)                                          \
    X(sched_reserve, __real_ggml_backend_sched_reserve)                                            \
    X(buffer_clear, __real_ggml_backend_buffer_clear)                                              \
    X(buffer_free, __real_ggml_backend_buffer_free)                                                \
    X(tensor_copy, __real_ggml_backend_tensor_copy)                                                \
    X(gguf_init_from_file, __real_gguf_init_from_file)                                             \
    X(fopen, __real_ggml_fopen)
#define FOUND(X)                                                                                   \
    X(ggml_backend_buffer_get_base)                                                                \
    X(ggml_backend_buffer_get_size)                                                                \
    X(ggml_backend_buffer_name)                                                                    \
    X(ggml_backend_buffer_is_host)                                                                 \
    X(ggml_backend_tensor_alloc)                                                                   \
    X(ggml_backend_buft_alloc_buffer)                                                              \
    X(ggml_backend_cpu_buffer_type)                                                                \
    X(ggml_backend_buffer_get_type)                                                                \
    X(ggml_backend_sched_synchronize)
#define DECLARE(member, name) extern void name(void);
#define DECLARE_FOUND(name) extern void name(void);
PLAIN(DECLARE)
FOUND(DECLARE_FOUND)
extern void ggml_backend_sched_reset(void *);
extern int __real_fileno(FILE *);

static void *find_function(const struct kvs_ggml *g, const char *name)
{
    static const struct {
        const char *name;
        void (*function)(void);
    } functions[] = {
#define ROW(name) {#name, name},
        FOUND(ROW){"ggml_backend_buffer_free", __real_ggml_backend_buffer_free},
#undef ROW
    };
    (void)g;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (strcmp(functions[i].name, name) == 0)
            return (void *)(uintptr_t)functions[i].function;
    return NULL;
}

/* Ollama compiles its ggml without a version. */
static const char *version(void)
{
    return "of Ollama";
}

static struct kvs_ggml ggml;

static void resolve(void)
{
    void *f;
#define SET(member, name)                                                                          \
    f = (void *)(uintptr_t)(name);                                                                 \
    memcpy(&ggml.member, &f, sizeof f);
    PLAIN(SET)
#undef SET
    ggml.version = version;
    ggml.find = find_function;
    ggml.is_llama = engine == KVS_LINK_LLAMA || engine == KVS_LINK_OLLAMA;
    ggml.cache_heads = engine == KVS_LINK_OLLAMA;
    if (!kvs_layout_find(&ggml))
        kvs_die("the tensor layout of Ollama's ggml is not one that kvshield understands");
}

static struct kvs_ggml *the(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, resolve);
    return &ggml;
}

int kvs_link_open(const char *path, char *out, size_t len)
{
    struct kvs_ggml *g = the();
    struct kvs_model *m;
    bool refused;
    kvs_session_begin(g->version());
    if (strlen(path) >= len)
        kvs_die("the path of the model is longer than %zu bytes", len - 1);
    strcpy(out, path);
    if (kvs_exchange(path, &m, &refused)) {
        if (m->original >= 0 && !kvs_link_weights(m))
            kvs_model_complete(m);
        kvs_model_path(m, out, len);
    }
    if (refused)
        snprintf(out, len, "%s", kvs_refusal());
    return !refused;
}

/* --- what is wrapped --- */

#define WRAP(result, name, ...)                                                                    \
    result __wrap_##name(__VA_ARGS__);                                                             \
    result __wrap_##name(__VA_ARGS__)

/* The runner's own words about a failed load would come after the reason, and Ollama takes the last. */
static _Noreturn void end_refused(void)
{
    enum { READ_WITHIN_US = 200 * 1000 }; /* Ollama stops reading when the process has ended */
    usleep(READ_WITHIN_US);
    _exit(1);
}

WRAP(struct gguf_context *, gguf_init_from_file, const char *path, struct kvs_gguf_init_params params)
{
    errno = 0;
    struct gguf_context *model = kvs_entry_gguf(the(), path, params);
    if (!model && engine == KVS_LINK_LLAMA && errno == EPERM)
        end_refused();
    return model;
}

WRAP(FILE *, ggml_fopen, const char *path, const char *mode)
{
    return kvs_entry_fopen(the(), path, mode);
}

WRAP(int, fileno, FILE *file)
{
    int fd = kvs_overlay_fileno(file);
    return fd >= 0 ? fd : __real_fileno(file);
}

WRAP(void *, mmap, void *at, size_t len, int prot, int flags, int fd, off_t offset)
{
    return kvs_entry_mmap(at, len, prot, flags, fd, offset);
}

WRAP(void, ggml_backend_sched_set_eval_callback, void *sched, kvs_eval_callback callback, void *user)
{
    kvs_host_callback(the(), sched, callback, user);
}

#define ALLOC_FAILED (-2)

WRAP(int, ggml_backend_sched_graph_compute_async, void *sched, struct ggml_cgraph *graph)
{
    struct kvs_ggml *g = the();
    if (engine == KVS_LINK_NONE)
        kvs_die("a graph is computed outside a runner, where kvshield does not shield it");
    if (engine == KVS_LINK_OLLAMA) {
        kvs_link_name_caches(g, graph);
        if (watcher && kvs_session_resident())
            watcher();
        /* This engine leaves the graph's memory to the computation; the hook needs to know it before. */
        ggml_backend_sched_reset(sched);
        if (!g->sched_alloc(sched, graph))
            return ALLOC_FAILED;
    }
    int status = kvs_entry_compute(g, sched, graph);
    if (status == ALLOC_FAILED && engine == KVS_LINK_OLLAMA) /* which says no more than that number to its client */
        kvs_die("the KV cache of this context does not fit the enclave; use a smaller context (num_ctx), --enclave-storage q8_0, or a "
                "larger --enclave-memory");
    return status;
}

WRAP(bool, ggml_backend_sched_alloc_graph, void *sched, struct ggml_cgraph *graph)
{
    return kvs_entry_alloc(the(), sched, graph);
}

WRAP(bool, ggml_backend_sched_reserve, void *sched, struct ggml_cgraph *graph)
{
    struct kvs_ggml *g = the();
    /* Ollama's own engine measures with caches that it throws away again. */
    return engine == KVS_LINK_OLLAMA ? g->sched_reserve(sched, graph) : kvs_entry_reserve(g, sched, graph);
}

WRAP(void, ggml_backend_buffer_clear, struct ggml_backend_buffer *buffer, uint8_t value)
{
    kvs_entry_buffer_clear(the(), buffer, value);
}

WRAP(void, ggml_backend_buffer_free, struct ggml_backend_buffer *buffer)
{
    kvs_entry_buffer_free(the(), buffer);
}

WRAP(void, ggml_backend_tensor_copy, struct ggml_tensor *from, struct ggml_tensor *to)
{
    kvs_entry_tensor_copy(the(), from, to);
}

WRAP(void, ggml_backend_tensor_get, const struct ggml_tensor *t, void *data, size_t offset, size_t size)
{
    kvs_entry_tensor_get(the(), t, data, offset, size);
}

WRAP(void, ggml_backend_tensor_set, struct ggml_tensor *t, const void *data, size_t offset, size_t size)
{
    kvs_link_tensor_set(the(), t, data, offset, size);
}
