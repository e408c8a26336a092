/* What every flavour of the hook does when the engine calls one of the functions that it stands in for. */
#ifndef KVS_ENTRY_H
#define KVS_ENTRY_H

#include "kvs.h"

#include <sys/types.h>

KVS_HIDDEN struct gguf_context *kvs_entry_gguf(struct kvs_ggml *g, const char *path, struct kvs_gguf_init_params params);
KVS_HIDDEN struct gguf_context *kvs_entry_gguf_ptr(struct kvs_ggml *g, FILE *file, struct kvs_gguf_init_params params);
KVS_HIDDEN FILE *kvs_entry_fopen(struct kvs_ggml *g, const char *path, const char *mode);
KVS_HIDDEN void *kvs_entry_mmap(void *at, size_t len, int prot, int flags, int fd, off_t offset);
/* Whether libllama opens a model for direct I/O, past ggml_fopen. Told that this is not to be had, it falls back to that. */
KVS_HIDDEN bool kvs_entry_is_direct(const char *path, int flags);
KVS_HIDDEN int kvs_entry_compute(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph);
KVS_HIDDEN bool kvs_entry_reserve(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph);
KVS_HIDDEN bool kvs_entry_alloc(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph);
KVS_HIDDEN void kvs_entry_buffer_clear(struct kvs_ggml *g, struct ggml_backend_buffer *buffer, uint8_t value);
KVS_HIDDEN void kvs_entry_buffer_free(struct kvs_ggml *g, struct ggml_backend_buffer *buffer);
KVS_HIDDEN void kvs_entry_tensor_copy(struct kvs_ggml *g, struct ggml_tensor *from, struct ggml_tensor *to);
KVS_HIDDEN void kvs_entry_tensor_get(struct kvs_ggml *g, const struct ggml_tensor *t, void *data, size_t offset, size_t size);
KVS_HIDDEN void kvs_entry_tensor_set(struct kvs_ggml *g, struct ggml_tensor *t, const void *data, size_t offset, size_t size);

#endif
