/*
 * The preload build of the hook: defines the functions that libllama calls across a shared-library
 * boundary, so that the dynamic linker hands them to kvshield first. Nothing runs before one of them is
 * called: in a process without libllama this library is inert.
 *
 * The real functions are found through the caller, not with RTLD_NEXT: hosts such as Node and Python load
 * libllama with local scope, where RTLD_NEXT does not see it.
 */
#define _GNU_SOURCE
#include "entry.h"
#include "preload.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_CALLERS 32

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct kvs_ggml callers[MAX_CALLERS];
static size_t count;

void *kvs_look_up(void *handle, const char *name, const void *own, bool required)
{
    void *real = handle ? dlsym(handle, name) : NULL;
    if (!real || real == own)
        real = dlsym(RTLD_NEXT, name);
    if ((!real || real == own) && required)
        kvs_die("this engine's ggml has no function %s; kvshield does not know this version of llama.cpp", name);
    return real == own ? NULL : real;
}

/* The real function of a library that calls this one. */
kvs_function kvs_real(const char *name, const void *own, const void *caller)
{
    Dl_info at;
    void *handle = dladdr(caller, &at) ? dlopen(at.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : NULL;
    kvs_function f;
    *(void **)(void *)&f = kvs_look_up(handle, name, own, true);
    return f;
}

EXPORT struct gguf_context *gguf_init_from_file(const char *, struct kvs_gguf_init_params);
EXPORT struct gguf_context *gguf_init_from_file_ptr(FILE *, struct kvs_gguf_init_params);
EXPORT FILE *ggml_fopen(const char *, const char *);
EXPORT void ggml_backend_sched_set_eval_callback(void *, kvs_eval_callback, void *);
EXPORT int ggml_backend_sched_graph_compute_async(void *, struct ggml_cgraph *);
EXPORT bool ggml_backend_sched_reserve(void *, struct ggml_cgraph *);
EXPORT bool ggml_backend_sched_alloc_graph(void *, struct ggml_cgraph *);
EXPORT void ggml_backend_buffer_clear(struct ggml_backend_buffer *, uint8_t);
EXPORT void ggml_backend_buffer_free(struct ggml_backend_buffer *);
EXPORT void ggml_backend_tensor_copy(struct ggml_tensor *, struct ggml_tensor *);
EXPORT void ggml_backend_tensor_get(const struct ggml_tensor *, void *, size_t, size_t);
EXPORT void ggml_backend_tensor_set(struct ggml_tensor *, const void *, size_t, size_t);
EXPORT uint32_t llama_model_quantize(const char *, const char *, const void *);

static void resolve(struct kvs_ggml *g, void *h)
{
#define GET(member, name, own, required) \
    *(void **)(void *)&g->member = kvs_look_up(h, name, (const void *)(uintptr_t)(own), required)
    GET(version, "ggml_version", NULL, true);
    GET(init, "ggml_init", NULL, true);
    GET(free, "ggml_free", NULL, true);
    GET(new_tensor_2d, "ggml_new_tensor_2d", NULL, true);
    GET(mul_mat, "ggml_mul_mat", NULL, true);
    GET(rope_ext, "ggml_rope_ext", NULL, true);
    GET(reshape_2d, "ggml_reshape_2d", NULL, true);
    GET(get_name, "ggml_get_name", NULL, true);
    GET(set_name, "ggml_set_name", NULL, true);
    GET(op_desc, "ggml_op_desc", NULL, true);
    GET(nbytes, "ggml_nbytes", NULL, true);
    GET(set_output, "ggml_set_output", NULL, true);
    GET(get_data, "ggml_get_data", NULL, true);
    GET(is_contiguous, "ggml_is_contiguous", NULL, true);
    GET(graph_n_nodes, "ggml_graph_n_nodes", NULL, true);
    GET(graph_node, "ggml_graph_node", NULL, true);
    GET(tensor_get, "ggml_backend_tensor_get", ggml_backend_tensor_get, true);
    GET(tensor_set, "ggml_backend_tensor_set", ggml_backend_tensor_set, true);
    GET(set_eval_callback, "ggml_backend_sched_set_eval_callback", ggml_backend_sched_set_eval_callback, true);
    GET(graph_compute_async, "ggml_backend_sched_graph_compute_async", ggml_backend_sched_graph_compute_async, true);
    GET(sched_alloc, "ggml_backend_sched_alloc_graph", ggml_backend_sched_alloc_graph, true);
    GET(sched_reserve, "ggml_backend_sched_reserve", ggml_backend_sched_reserve, true);
    GET(buffer_clear, "ggml_backend_buffer_clear", ggml_backend_buffer_clear, true);
    GET(buffer_free, "ggml_backend_buffer_free", ggml_backend_buffer_free, true);
    GET(tensor_copy, "ggml_backend_tensor_copy", ggml_backend_tensor_copy, true);
    GET(gguf_init_from_file, "gguf_init_from_file", gguf_init_from_file, true);
    GET(gguf_init_from_file_ptr, "gguf_init_from_file_ptr", gguf_init_from_file_ptr, false);
    GET(fopen, "ggml_fopen", ggml_fopen, true);
#undef GET
}

/* Whether `handle` is libllama itself, loaded at `base`, and not something that merely links to it. */
static bool is_llama(void *handle, const void *base)
{
    void *load = handle ? dlsym(handle, "llama_model_load_from_file") : NULL;
    if (handle && !load)
        load = dlsym(handle, "llama_load_model_from_file"); /* its name until 2025 */
    Dl_info at;
    return load && dladdr(load, &at) && at.dli_fbase == base;
}

/* Functions that only some features need: an engine that lacks one runs shielded nevertheless. */
static void *find_function(const struct kvs_ggml *g, const char *name)
{
    Dl_info at;
    void *handle = dladdr(g->caller, &at) ? dlopen(at.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : NULL;
    return kvs_look_up(handle, name, NULL, false);
}

/* The ggml that the code at `address` uses. Looked up once for each library that calls. */
static struct kvs_ggml *ggml_of(const void *address)
{
    Dl_info at;
    if (!dladdr(address, &at))
        kvs_die("a call into ggml comes from no library; kvshield cannot follow generated code");
    pthread_mutex_lock(&lock);
    struct kvs_ggml *g = NULL;
    for (size_t i = 0; i < count && !g; i++)
        if (callers[i].caller == at.dli_fbase)
            g = &callers[i];
    if (!g) {
        if (count == MAX_CALLERS)
            kvs_die("more than %d libraries of this program call ggml", MAX_CALLERS);
        void *handle = dlopen(at.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
        g = &callers[count];
        resolve(g, handle);
        g->caller = at.dli_fbase;
        g->find = find_function;
        g->is_llama = is_llama(handle, at.dli_fbase);
        if (!kvs_layout_find(g))
            kvs_die("the tensor layout of this engine's ggml (%s) is not one that kvshield understands", g->version());
        count++;
    }
    pthread_mutex_unlock(&lock);
    return g;
}
#define CALLER() ggml_of(__builtin_return_address(0))

/* For what is called many times for each token: a library's address is looked up once for each place that calls. */
static struct kvs_ggml *ggml_of_often(const void *address)
{
    static _Thread_local struct {
        const void *address;
        struct kvs_ggml *g;
    } seen[64];
    size_t i = ((uintptr_t)address >> 2) % (sizeof seen / sizeof *seen);
    if (seen[i].address != address) {
        seen[i].g = ggml_of(address);
        seen[i].address = address;
    }
    return seen[i].g;
}

static _Thread_local bool quantising; /* what this thread opens is no model to be run */

struct gguf_context *gguf_init_from_file(const char *path, struct kvs_gguf_init_params params)
{
    struct kvs_ggml *g = CALLER();
    return quantising ? g->gguf_init_from_file(path, params) : kvs_entry_gguf(g, path, params);
}

struct gguf_context *gguf_init_from_file_ptr(FILE *file, struct kvs_gguf_init_params params)
{
    struct kvs_ggml *g = CALLER();
    return quantising ? g->gguf_init_from_file_ptr(file, params) : kvs_entry_gguf_ptr(g, file, params);
}

FILE *ggml_fopen(const char *path, const char *mode)
{
    struct kvs_ggml *g = CALLER();
    return quantising ? g->fopen(path, mode) : kvs_entry_fopen(g, path, mode);
}

EXPORT int fileno(FILE *file)
{
    static int (*real)(FILE *);
    int fd = kvs_overlay_fileno(file);
    if (fd >= 0)
        return fd;
    if (!real)
        *(void **)(void *)&real = dlsym(RTLD_NEXT, "fileno");
    return real(file);
}

EXPORT void *mmap(void *at, size_t len, int prot, int flags, int fd, off_t offset)
{
    return kvs_entry_mmap(at, len, prot, flags, fd, offset);
}

EXPORT void *mmap64(void *at, size_t len, int prot, int flags, int fd, off64_t offset)
{
    return kvs_entry_mmap(at, len, prot, flags, fd, offset);
}

#define DEFINE_OPEN(name)                                                                          \
    EXPORT int name(const char *path, int flags, ...)                                              \
    {                                                                                              \
        static int (*real)(const char *, int, ...);                                                \
        mode_t mode = 0;                                                                           \
        if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) {                                                            \
            va_list args;                                                                          \
            va_start(args, flags);                                                                 \
            mode = va_arg(args, mode_t);                                                           \
            va_end(args);                                                                          \
        }                                                                                          \
        if (!real)                                                                                 \
            *(void **)(void *)&real = dlsym(RTLD_NEXT, #name);                                     \
        if (kvs_entry_is_direct(path, flags)) {                                                \
            errno = EINVAL;                                                                        \
            return -1;                                                                             \
        }                                                                                          \
        return real(path, flags, mode);                                                            \
    }
DEFINE_OPEN(open)
DEFINE_OPEN(open64)

void ggml_backend_sched_set_eval_callback(void *sched, kvs_eval_callback callback, void *user)
{
    kvs_host_callback(CALLER(), sched, callback, user);
}

int ggml_backend_sched_graph_compute_async(void *sched, struct ggml_cgraph *graph)
{
    return kvs_entry_compute(CALLER(), sched, graph);
}

bool ggml_backend_sched_alloc_graph(void *sched, struct ggml_cgraph *graph)
{
    return kvs_entry_alloc(ggml_of_often(__builtin_return_address(0)), sched, graph);
}

bool ggml_backend_sched_reserve(void *sched, struct ggml_cgraph *graph)
{
    return kvs_entry_reserve(CALLER(), sched, graph);
}

void ggml_backend_buffer_clear(struct ggml_backend_buffer *buffer, uint8_t value)
{
    kvs_entry_buffer_clear(CALLER(), buffer, value);
}

void ggml_backend_buffer_free(struct ggml_backend_buffer *buffer)
{
    kvs_entry_buffer_free(CALLER(), buffer);
}

void ggml_backend_tensor_copy(struct ggml_tensor *from, struct ggml_tensor *to)
{
    kvs_entry_tensor_copy(CALLER(), from, to);
}

void ggml_backend_tensor_get(const struct ggml_tensor *t, void *data, size_t offset, size_t size)
{
    kvs_entry_tensor_get(ggml_of_often(__builtin_return_address(0)), t, data, offset, size);
}

void ggml_backend_tensor_set(struct ggml_tensor *t, const void *data, size_t offset, size_t size)
{
    kvs_entry_tensor_set(ggml_of_often(__builtin_return_address(0)), t, data, offset, size);
}

/* Models are quantised as they are: nothing is computed with them, and permuted weights must not be written to disk. */
uint32_t llama_model_quantize(const char *in, const char *out, const void *params)
{
    uint32_t (*real)(const char *, const char *, const void *);
    *(void **)(void *)&real = kvs_look_up(NULL, "llama_model_quantize", (const void *)(uintptr_t)llama_model_quantize, true);
    kvs_session_begin("");
    quantising = true;
    uint32_t result = real(in, out, params);
    quantising = false;
    return result;
}
