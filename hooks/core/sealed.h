/* What sealing (seal.c) and opening (unseal.c) share. */
#ifndef KVS_SEALED_H
#define KVS_SEALED_H

#include "record.h"

#define KVS_STATE_MAGIC 0x5453564bu /* "KVST" */
#define KVS_STATE_VERSION 1
#define KVS_SEAL_HEADER 320
#define KVS_SEAL_OVERHEAD 32
#define KVS_STATE_MAX ((size_t)1 << 40)

enum { SEAL_BEGIN = 0, SEAL_TEXT, SEAL_CELLS, SEAL_END };
enum { UNSEAL_BEGIN = 0, UNSEAL_CHECK, UNSEAL_PLACE };

struct kvs_bytes {
    uint8_t *p;
    size_t n, capacity;
};

struct kvs_prefix {
    uint32_t magic, version, tokens, layers;
    uint64_t state;
};

struct kvs_tokens_out {
    int32_t *at; /* NULL: only the number is wanted */
    size_t capacity, *count;
};

KVS_HIDDEN void kvs_bytes_append(struct kvs_bytes *b, const void *data, size_t n);
KVS_HIDDEN void kvs_bytes_discard(struct kvs_bytes *b); /* wipes them */
/* One operation of KVS_SEAL or KVS_UNSEAL; appends the answer. False when it was refused. */
KVS_HIDDEN bool kvs_seal_request(struct kvs_call *call, uint8_t *body, uint32_t op, const void *data, size_t n, struct kvs_bytes *out);
/* How many cells go into one record; 0 when none fits. */
KVS_HIDDEN size_t kvs_seal_cells(const struct kvs_call *call, const struct kvs_cache *c);
KVS_HIDDEN bool kvs_unseal(const struct kvs_state *s, const uint8_t *p, size_t n, const struct kvs_tokens_out *tokens);

#endif
