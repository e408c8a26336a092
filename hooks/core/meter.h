/* What the hook counts (meter.c), and whose tokens a graph computes (batches.c). */
#ifndef KVS_METER_H
#define KVS_METER_H

#include "kvs.h"

#define KVS_NO_LAYER UINT32_MAX
#define KVS_PARTS_MAX 256 /* libllama's own limit of sequences */

struct kvs_part {
    int32_t sequence;
    uint32_t tokens;
};

/* Maps the supervisor's memory and closes the descriptor. Until then nothing is counted. */
KVS_HIDDEN void kvs_meter_attach(int fd);
/* One transition of the graph that this thread computes. One at a time: the channel's turn is held. */
KVS_HIDDEN void kvs_meter_transition(uint32_t layer, int64_t start, int64_t ns, uint64_t enclave_ns, size_t bytes);
KVS_HIDDEN void kvs_meter_begin(int64_t now);
KVS_HIDDEN void kvs_meter_end(int64_t now, uint32_t tokens, const struct kvs_part *parts, size_t count);
KVS_HIDDEN int64_t kvs_now_ns(void); /* CLOCK_MONOTONIC */

/*
 * The engine's batches, as it fills and hands them in. A batch is known by its address; the next token of a batch gets the next
 * index in it.
 */
KVS_HIDDEN void kvs_batch_add(const void *batch, int32_t sequence);
KVS_HIDDEN void kvs_batch_clear(const void *batch);
KVS_HIDDEN void kvs_batch_free(const void *batch);
/* This thread's next graphs compute the batch's tokens, until the next one is begun. */
KVS_HIDDEN void kvs_batch_begin(const void *batch);
/* Sequences of a batch that is known only while it is handed in. */
KVS_HIDDEN void kvs_batch_begin_sequences(const int32_t *sequences, size_t tokens);

/* Where a graph says which cells its tokens get. */
struct kvs_cells {
    const struct ggml_tensor *index; /* NULL where it does not say */
    uint32_t tokens, cells;          /* cells of one stream */
    uint32_t streams;
};
KVS_HIDDEN struct kvs_cells kvs_graph_cells(const struct kvs_ggml *g, struct ggml_cgraph *graph);
/* Whose tokens the graph's are: at most KVS_PARTS_MAX parts, none where that is not known. */
KVS_HIDDEN size_t kvs_batch_parts(const struct kvs_ggml *g, const struct kvs_cells *c, struct kvs_part *parts);

#endif
