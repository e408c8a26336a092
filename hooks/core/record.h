/* Cells that the engine reads, writes or still uses (record.c), and states sealed by the enclave (seal.c). */
#ifndef KVS_RECORD_H
#define KVS_RECORD_H

#include "kvs.h"

struct kvs_recorded {
    struct kvs_cache *cache;
    int64_t *cells; /* in the engine's order */
    size_t count, capacity;
};
/* The layers in the order in which the engine came to them. */
struct kvs_record {
    struct kvs_recorded *layers;
    size_t count;
};
/* Whether this thread is inside a call that the hook itself made: the engine's functions call each other. */
KVS_HIDDEN bool kvs_own_call(void);
KVS_HIDDEN void kvs_own_calls(int change);
/* Between begin and end, what this thread reads from and writes to a cache is noted and not done. */
KVS_HIDDEN void kvs_record_begin(struct kvs_record *r);
KVS_HIDDEN void kvs_record_end(void);
KVS_HIDDEN void kvs_record_free(struct kvs_record *r);

/* Counts what may change the content of a cache. */
KVS_HIDDEN void kvs_cells_change(void);
KVS_HIDDEN uint64_t kvs_cells_changes(void);

/* Wipes the cells of a cache in the enclave that have no bit. */
KVS_HIDDEN void kvs_cells_keep(const struct kvs_cache *c, const uint32_t *bits);

/* The engine's own functions for the state of a whole context. */
struct kvs_states {
    size_t (*get_size)(const void *context);
    size_t (*get_data)(const void *context, uint8_t *dst, size_t size);
};
KVS_HIDDEN void kvs_context_memory(const void *context, const void *memory);
KVS_HIDDEN void kvs_context_freed(const void *context);
/* Before and after cells were taken from sequences: what no sequence uses any more is wiped in the enclave. Whole: a sequence
 * is gone; else a part of one, of which nothing may be left for a moment. */
KVS_HIDDEN void kvs_cells_removing(const struct kvs_states *f, const void *memory);
KVS_HIDDEN void kvs_cells_removed(const struct kvs_states *f, const void *memory, bool whole);

/* seal.c: one state, of a sequence or of the whole context. */
struct kvs_state {
    const void *context;
    int32_t sequence; /* -1: all */
    uint32_t flags;
    size_t (*size)(const struct kvs_state *);                                  /* the engine's own */
    size_t (*get)(const struct kvs_state *, uint8_t *dst, size_t size);
    size_t (*set)(const struct kvs_state *, const uint8_t *src, size_t size);
    const void *functions; /* of the engine, for the three */
};
/* The length of the sealed state, which is kept for the call that fetches it; 0 when there is none. */
KVS_HIDDEN size_t kvs_sealed_size(const struct kvs_state *s);
KVS_HIDDEN size_t kvs_sealed_get(const struct kvs_state *s, uint8_t *dst, size_t size);
/* How much of src was taken; 0 when it was refused, with a message. */
KVS_HIDDEN size_t kvs_sealed_set(const struct kvs_state *s, const uint8_t *src, size_t size);
KVS_HIDDEN size_t kvs_sealed_save(const struct kvs_state *s, const char *path, const int32_t *tokens, size_t count);
KVS_HIDDEN size_t kvs_sealed_load(const struct kvs_state *s, const char *path, int32_t *tokens, size_t capacity, size_t *count);

#endif
