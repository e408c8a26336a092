/* Ollama's own engine, as far as its graphs differ from libllama's. */
#ifndef KVS_LINK_ENGINE_H
#define KVS_LINK_ENGINE_H

#include "entry.h"

/* Gives the caches of a graph the names that libllama gives its own. A state that is no such cache ends the process, unless that
 * is not shielded. */
KVS_HIDDEN void kvs_link_name_caches(struct kvs_ggml *g, struct ggml_cgraph *graph);

/* link.c: whether this process is a runner that is shielded. */
KVS_HIDDEN bool kvs_link_shields(void);

/* weights.c: fills the holes of a shielded model while the engine loads it. False where it would have to know more than it does. */
KVS_HIDDEN bool kvs_link_weights(struct kvs_model *m);
KVS_HIDDEN void kvs_link_tensor_set(struct kvs_ggml *g, struct ggml_tensor *t, const void *data, size_t offset, size_t size);

#endif
