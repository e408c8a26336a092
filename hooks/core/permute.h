/* What mode permute does with one graph. */
#ifndef KVS_PERMUTE_H
#define KVS_PERMUTE_H

#include "kvs.h"

struct kvs_target {
    struct ggml_tensor *tensor; /* an attention output */
    uint32_t layer;
};

struct kvs_inversion {
    struct kvs_ggml *g;
    struct kvs_model *model;
    struct kvs_model *last; /* whose graph was computed before: a context belongs to one model */
    struct kvs_target *targets; /* in the order in which they are computed */
    size_t count, capacity, next;
};

/* Fills the targets; afterwards the model is set or there is nothing to shield in this graph. */
KVS_HIDDEN void kvs_permute_scan(struct kvs_inversion *s, struct ggml_cgraph *graph);
KVS_HIDDEN bool kvs_permute_wants(const struct kvs_inversion *s, const struct ggml_tensor *t);
/* Takes the next target through the enclave. */
KVS_HIDDEN void kvs_permute_invert(struct kvs_inversion *s);
/* The layer of a target that was passed over, or -1. */
KVS_HIDDEN long kvs_permute_missing(const struct kvs_inversion *s);

#endif
