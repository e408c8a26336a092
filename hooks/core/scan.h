/* What scan.c and steps.c share. */
#ifndef KVS_SCAN_H
#define KVS_SCAN_H

#include "plan.h"

/* The cache whose memory a tensor looks at, through views and copies; NULL for none. */
KVS_HIDDEN const struct ggml_tensor *kvs_cache_behind(const struct kvs_plan *p, struct kvs_ggml *g, const struct ggml_tensor *t);
KVS_HIDDEN bool kvs_is_values(struct kvs_ggml *g, const struct ggml_tensor *cache);
/* The last write of the graph into a cache, or NULL. */
KVS_HIDDEN struct kvs_write *kvs_write_of(struct kvs_plan *p, const struct ggml_tensor *cache);
/* Has the engine pass over a node. */
KVS_HIDDEN void kvs_plan_blank(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_tensor *node);
KVS_HIDDEN _Noreturn void kvs_not_known(struct kvs_ggml *g, const struct ggml_tensor *node, const char *what);

/* Each adds a step for the node at a place of the graph, which reads the cache k. */
KVS_HIDDEN void kvs_step_flash(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_tensor *node, const struct ggml_tensor *k, int at);
KVS_HIDDEN void kvs_step_plain(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_cgraph *graph, const struct ggml_tensor *k, int at);
KVS_HIDDEN void kvs_step_rotation(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_tensor *node, const struct ggml_tensor *k,
                                  const struct ggml_tensor *hadamard, int at);

#endif
