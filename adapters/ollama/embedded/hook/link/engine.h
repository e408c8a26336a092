/* Ollama's own engine, as far as its graphs differ from libllama's. */
#ifndef KVS_LINK_ENGINE_H
#define KVS_LINK_ENGINE_H

#include "kvs.h"

/* Gives the caches of a graph the names that libllama gives its own, and ends the process at a state that is no such cache. */
KVS_HIDDEN void kvs_link_name_caches(struct kvs_ggml *g, struct ggml_cgraph *graph);

#endif
