#define _GNU_SOURCE
#include "entry.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Opened again under another name, or under the memory file's own: not the engine's first look at a model. */
static bool is_own_path(const char *path)
{
    return strncmp(path, "/proc/self/fd/", 14) == 0;
}

struct gguf_context *kvs_entry_gguf(struct kvs_ggml *g, const char *path, struct kvs_gguf_init_params params)
{
    if (!g->is_llama || !path || is_own_path(path))
        return g->gguf_init_from_file(path, params);
    kvs_session_begin(g->version());
    struct kvs_model *m;
    bool refused;
    if (kvs_exchange(path, &m, &refused)) {
        char shielded[64];
        kvs_model_path(m, shielded, sizeof shielded);
        return g->gguf_init_from_file(shielded, params);
    }
    if (refused) {
        errno = EPERM;
        return NULL;
    }
    return g->gguf_init_from_file(path, params);
}

struct gguf_context *kvs_entry_gguf_ptr(struct kvs_ggml *g, FILE *file, struct kvs_gguf_init_params params)
{
    bool refused = false;
    if (g->is_llama && file) {
        kvs_session_begin(g->version());
        kvs_exchange_fd(fileno(file), &refused);
    }
    if (refused) {
        errno = EPERM;
        return NULL;
    }
    return g->gguf_init_from_file_ptr(file, params);
}

FILE *kvs_entry_fopen(struct kvs_ggml *g, const char *path, const char *mode)
{
    struct kvs_model *m = g->is_llama && path ? kvs_exchanged(path) : NULL;
    if (!m)
        return g->fopen(path, mode);
    if (m->used || strchr(mode, 'w') || strchr(mode, '+') || strchr(mode, 'a')) {
        kvs_say("error: %s: opened in a way that kvshield does not know, after it was shielded: refused", path);
        errno = EPERM;
        return NULL;
    }
    if (m->original >= 0) {
        kvs_model_consumed(m);
        return kvs_overlay_open(m);
    }
    char shielded[64];
    kvs_model_path(m, shielded, sizeof shielded);
    return g->fopen(shielded, mode);
}

/* A raw system call where it is none of our business: the dynamic linker itself needs memory to look a function up. */
void *kvs_entry_mmap(void *at, size_t len, int prot, int flags, int fd, off_t offset)
{
    if (fd >= 0 && at == NULL && offset == 0 && prot == PROT_READ && (flags & MAP_SHARED)) {
        struct kvs_model *m = kvs_model_of_file(fd);
        if (m)
            return kvs_overlay_map(m, len, prot, flags);
    }
    return (void *)syscall(SYS_mmap, at, len, prot, flags, fd, (long)offset);
}

bool kvs_entry_is_direct(const char *path, int flags)
{
    return (flags & O_DIRECT) && path && kvs_exchanged(path);
}

int kvs_entry_compute(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph)
{
    /* Scheduled by ggml itself on behalf of a projector, or by a library that is not libllama. */
    if (!g->is_llama)
        return g->graph_compute_async(sched, graph);
    kvs_session_begin(g->version());
    return kvs_graph_compute(g, sched, graph);
}

bool kvs_entry_reserve(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph)
{
    if (!g->is_llama)
        return g->sched_reserve(sched, graph);
    kvs_session_begin(g->version());
    return kvs_graph_reserve(g, sched, graph);
}

bool kvs_entry_alloc(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph)
{
    kvs_graph_laid_out(sched);
    return g->sched_alloc(sched, graph);
}

void kvs_entry_buffer_clear(struct kvs_ggml *g, struct ggml_backend_buffer *buffer, uint8_t value)
{
    g->buffer_clear(buffer, value);
    kvs_buffer_cleared(buffer);
}

void kvs_entry_buffer_free(struct kvs_ggml *g, struct ggml_backend_buffer *buffer)
{
    kvs_buffer_freed(buffer);
    g->buffer_free(buffer);
}

void kvs_entry_tensor_copy(struct kvs_ggml *g, struct ggml_tensor *from, struct ggml_tensor *to)
{
    if (!kvs_session_resident() || !kvs_tensor_copied(g, from, to))
        g->tensor_copy(from, to);
}

void kvs_entry_tensor_get(struct kvs_ggml *g, const struct ggml_tensor *t, void *data, size_t offset, size_t size)
{
    if (!kvs_recorded(g, t, offset, size))
        g->tensor_get(t, data, offset, size);
}

void kvs_entry_tensor_set(struct kvs_ggml *g, struct ggml_tensor *t, const void *data, size_t offset, size_t size)
{
    if (!kvs_recorded(g, t, offset, size))
        g->tensor_set(t, data, offset, size);
}
