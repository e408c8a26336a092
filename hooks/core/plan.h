/* What mode resident does with one graph: scan.c makes the plan, resident.c carries it out. */
#ifndef KVS_PLAN_H
#define KVS_PLAN_H

#include "kvs.h"

#define KVS_SLOTS 8

/* Kinds of operations that have to be told apart. */
enum kvs_op {
    KVS_OP_UNSEEN,
    KVS_OP_OTHER,
    KVS_OP_NOTHING, /* a leaf or another look at a tensor: computes nothing */
    KVS_OP_SET_ROWS,
    KVS_OP_FLASH,
    KVS_OP_MUL_MAT,
    KVS_OP_SOFT_MAX,
    KVS_OP_SCALE,
    KVS_OP_COPY,
    KVS_OP_ROPE,
};
KVS_HIDDEN enum kvs_op kvs_op(struct kvs_ggml *g, const struct ggml_tensor *t);

/* A SET_ROWS into a cache. */
struct kvs_write {
    struct ggml_tensor *node;
    const struct ggml_tensor *cache, *source, *cells;
    uint32_t floats; /* that are written for each token */
    bool values, taken;
    bool scrub; /* no later node reads the source */
    bool early; /* taken when the engine would have, because the source may not last until attention */
    uint8_t *rows; /* what was taken early */
    size_t size;
    int at;
};

/* What the layers of one cache share in a graph. */
struct kvs_slot {
    const struct ggml_tensor *mask, *cells;
    uint32_t tokens, blocks, first, visible; /* tokens; streams; first cell that a row of the mask looks at, and how many */
    bool sent;
};

enum kvs_step_kind { KVS_STEP_ATTEND, KVS_STEP_ROTATE, KVS_STEP_TAKE };
struct kvs_step {
    enum kvs_step_kind kind;
    struct ggml_tensor *node; /* after which it is time; for attention the output */
    int at;
    bool done;
    const struct ggml_tensor *k; /* the cache's tensor of keys */
    struct kvs_cache *cache;
    uint32_t first, visible; /* cells that it looks at */
    /* attention */
    const struct ggml_tensor *q, *sinks, *mask;
    struct kvs_write *keys, *values; /* NULL when an earlier layer has written them */
    const struct kvs_write *cells_of;
    uint32_t slot;
    float scale, max_bias, softcap;
    bool flash, scrub_q;
    struct kvs_cache shape; /* as this step sees it; declared when it is new */
    /* an early take */
    struct kvs_write *take;
    /* rotation */
    const struct ggml_tensor *hadamard;
};

struct kvs_plan {
    struct kvs_write *writes;
    size_t write_count, write_capacity;
    struct kvs_step *steps;
    size_t count, capacity, next;
    struct {
        struct ggml_tensor *node;
        int op;
    } *blanks;
    size_t blank_count, blank_capacity;
    struct kvs_slot slots[KVS_SLOTS];
    size_t slot_count;
    struct kvs_leftover { /* a range of a tensor, to be wiped at the end of the graph */
        const struct ggml_tensor *tensor;
        size_t at, len;
    } *leftovers;
    size_t leftover_count, leftover_capacity;
    const struct ggml_tensor *tokens; /* ids of the graph's tokens, to be wiped; may be NULL */
    uint8_t *scratch;
    size_t scratch_size;
};
/* Makes room in a list for one more. */
KVS_HIDDEN void *kvs_plan_more(void *list, size_t count, size_t *capacity, size_t size);
KVS_HIDDEN struct kvs_step *kvs_plan_add_step(struct kvs_plan *p, enum kvs_step_kind kind, struct ggml_tensor *node, int at);
/* Adds what must be taken early; the steps are in the order of the graph then. */
KVS_HIDDEN void kvs_plan_takes(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_cgraph *graph);
/* Wipes rows that were taken and not used. */
KVS_HIDDEN void kvs_plan_forget(struct kvs_plan *p);
KVS_HIDDEN uint8_t *kvs_plan_scratch(struct kvs_plan *p, size_t size);

/* attend.c: the steps. */
KVS_HIDDEN void kvs_take(struct kvs_ggml *g, const struct kvs_step *s);
KVS_HIDDEN void kvs_attend(struct kvs_ggml *g, struct kvs_plan *p, struct kvs_step *s);
KVS_HIDDEN void kvs_rotate(struct kvs_ggml *g, const struct kvs_step *s);

/* scrub.c */
KVS_HIDDEN void kvs_wipe(struct kvs_ggml *g, const struct ggml_tensor *t, size_t at, size_t len);
/* Wipes rows, and nothing that lies between them. */
KVS_HIDDEN void kvs_wipe_rows(struct kvs_ggml *g, const struct ggml_tensor *t);
/* Marks what no later node reads, and finds what is left at the end. Before anything is taken out of the graph. */
KVS_HIDDEN void kvs_scrub_plan(struct kvs_ggml *g, struct kvs_plan *p, struct ggml_cgraph *graph);
/* Wipes the memory in which the graph's nodes had their results, except for what it was computed for. */
KVS_HIDDEN void kvs_scrub_results(struct kvs_ggml *g, const struct kvs_plan *p);

/* How many of `want` things of `each` bytes fit into `room`. */
static inline uint32_t kvs_at_most(uint32_t want, size_t room, size_t each)
{
    return room / each < want ? (uint32_t)(room / each) : want;
}

#endif
