/*
 * The kvshield hook: C that lives inside the engine's process.
 *
 * An interposer (adapters/llamacpp/preload, or adapters/ollama/embedded/hook/link) receives the engine's calls and hands
 * them to entry.c, which calls the entry points at the end of this file. One thread of the hook reads the session socket; everything else
 * runs on the engine's own threads. There is one way to fail: kvs_die, which ends the process,
 * because an engine that goes on without the enclave would answer with garbage or in the clear.
 *
 * Wire formats: docs/protocol.md.
 */
#ifndef KVS_H
#define KVS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define KVS_HIDDEN __attribute__((visibility("hidden")))

struct ggml_tensor;
struct ggml_context;
struct ggml_cgraph;
struct gguf_context;
struct ggml_backend_buffer;
typedef bool (*kvs_eval_callback)(struct ggml_tensor *tensor, bool ask, void *user);

/* Passed by value through the engine's ABI: the same members in the same order as ggml's own. */
struct kvs_ggml_init_params {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
};
struct kvs_gguf_init_params {
    bool no_alloc;
    struct ggml_context **ctx;
};

/* Where the members that the hook reads lie in this ggml's struct ggml_tensor. */
struct kvs_layout {
    size_t type, ne, nb, op, flags, src, view_src, name;
    int output;       /* the flag of a tensor that a graph is computed for */
    size_t rope_base; /* of a ROPE node: the base of its frequencies among its parameters */
};

struct kvs_backend;

/* One ggml library in this process: its functions and its tensor layout. */
struct kvs_ggml {
    const void *caller; /* load address of the library that called us */
    bool is_llama;      /* the caller is libllama, so a GGUF it opens is a model */
    bool cache_heads;   /* caches keep heads apart: [floats of a head, heads, cells], not [floats, cells, streams] */
    struct kvs_layout layout;
    struct kvs_backend *backend; /* backend.c's; NULL until it is asked for */
    uint8_t ops[256];            /* resident.c's: what an operation's number means in this ggml, once seen */
    void *(*find)(const struct kvs_ggml *, const char *name); /* another function of this ggml, or NULL */
    const char *(*version)(void);
    struct ggml_context *(*init)(struct kvs_ggml_init_params);
    void (*free)(struct ggml_context *);
    struct ggml_tensor *(*new_tensor_2d)(struct ggml_context *, int, int64_t, int64_t);
    struct ggml_tensor *(*mul_mat)(struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *);
    struct ggml_tensor *(*rope_ext)(struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *,
                                    struct ggml_tensor *, int, int, int, float, float, float, float, float, float);
    struct ggml_tensor *(*reshape_2d)(struct ggml_context *, struct ggml_tensor *, int64_t, int64_t);
    const char *(*get_name)(const struct ggml_tensor *);
    struct ggml_tensor *(*set_name)(struct ggml_tensor *, const char *);
    const char *(*op_desc)(const struct ggml_tensor *);
    void (*set_output)(struct ggml_tensor *);
    void *(*get_data)(const struct ggml_tensor *);
    size_t (*nbytes)(const struct ggml_tensor *);
    bool (*is_contiguous)(const struct ggml_tensor *);
    int (*graph_n_nodes)(struct ggml_cgraph *);
    struct ggml_tensor *(*graph_node)(struct ggml_cgraph *, int);
    void (*tensor_get)(const struct ggml_tensor *, void *, size_t, size_t);
    void (*tensor_set)(struct ggml_tensor *, const void *, size_t, size_t);
    void (*set_eval_callback)(void *, kvs_eval_callback, void *);
    int (*graph_compute_async)(void *, struct ggml_cgraph *);
    bool (*sched_reserve)(void *, struct ggml_cgraph *);
    bool (*sched_alloc)(void *, struct ggml_cgraph *);
    void (*buffer_clear)(struct ggml_backend_buffer *, uint8_t);
    void (*buffer_free)(struct ggml_backend_buffer *);
    void (*tensor_copy)(struct ggml_tensor *, struct ggml_tensor *);
    struct gguf_context *(*gguf_init_from_file)(const char *, struct kvs_gguf_init_params);
    struct gguf_context *(*gguf_init_from_file_ptr)(FILE *, struct kvs_gguf_init_params); /* may be NULL */
    FILE *(*fopen)(const char *, const char *);
};

#define KVS_GGML_TYPE_F32 0
#define KVS_GGML_TYPE_F16 1
#define KVS_GGML_TYPE_Q8_0 8
#define KVS_GGML_TYPE_BF16 30
#define KVS_GGML_MAX_SRC 10
#define KVS_GGML_TYPE_I8 24
#define KVS_GGML_TYPE_I32 26
#define KVS_GGML_STATUS_SUCCESS 0

static inline const char *kvs_name(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    return (const char *)t + g->layout.name;
}
static inline struct ggml_tensor *kvs_src(const struct kvs_ggml *g, const struct ggml_tensor *t, int i)
{
    return ((struct ggml_tensor *const *)((const char *)t + g->layout.src))[i];
}
static inline struct ggml_tensor *kvs_view_src(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    return *(struct ggml_tensor *const *)((const char *)t + g->layout.view_src);
}
static inline const int64_t *kvs_ne(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    return (const int64_t *)(const void *)((const char *)t + g->layout.ne);
}
static inline int64_t kvs_elements(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    const int64_t *ne = kvs_ne(g, t);
    return ne[0] * ne[1] * ne[2] * ne[3];
}
static inline const size_t *kvs_nb(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    return (const size_t *)(const void *)((const char *)t + g->layout.nb);
}
static inline int *kvs_op_of(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    return (int *)(void *)((char *)(uintptr_t)t + g->layout.op);
}
static inline bool kvs_is_output(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    return *(const int *)(const void *)((const char *)t + g->layout.flags) & g->layout.output;
}
static inline int kvs_type(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    return *(const int *)(const void *)((const char *)t + g->layout.type);
}

/* A node's parameter by its index, each of 4 bytes; those of ROPE tell where they begin. */
static inline int32_t kvs_param(const struct kvs_ggml *g, const struct ggml_tensor *t, int i)
{
    return *(const int32_t *)(const void *)((const char *)t + g->layout.rope_base - 20 + 4 * (size_t)i);
}
static inline float kvs_paramf(const struct kvs_ggml *g, const struct ggml_tensor *t, int i)
{
    int32_t bits = kvs_param(g, t, i);
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* How a ROPE node turns pairs of rows (ggml.h, ggml_rope_ext). */
struct kvs_rope {
    int32_t dims, mode, original; /* original: the length of the context before it was stretched */
    float base, scale, ext_factor, attn_factor, beta_fast, beta_slow;
};
static inline struct kvs_rope kvs_rope_of(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    return (struct kvs_rope){.dims = kvs_param(g, t, 1), .mode = kvs_param(g, t, 2), .original = kvs_param(g, t, 4),
                             .base = kvs_paramf(g, t, 5), .scale = kvs_paramf(g, t, 6), .ext_factor = kvs_paramf(g, t, 7),
                             .attn_factor = kvs_paramf(g, t, 8), .beta_fast = kvs_paramf(g, t, 9),
                             .beta_slow = kvs_paramf(g, t, 10)};
}

/* The tensor whose memory this one uses: its own, or that of what it is a view of. */
static inline const struct ggml_tensor *kvs_base(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    const struct ggml_tensor *base = kvs_view_src(g, t);
    return base ? base : t;
}
/* "cache_k_lN" or "cache_v_lN" and nothing more: a copy of one has a longer name. */
static inline bool kvs_is_cache(const char *name)
{
    if (strncmp(name, "cache_k_l", 9) != 0 && strncmp(name, "cache_v_l", 9) != 0)
        return false;
    size_t digits = strspn(name + 9, "0123456789");
    return digits > 0 && name[9 + digits] == 0;
}

/* layout.c: fills g->layout by building a small graph; false when the layout is not understood. */
KVS_HIDDEN bool kvs_layout_find(struct kvs_ggml *g);
/* The offset of the member in which `t`, and not `without`, points to `pointer`; (size_t)-1 when there is none. */
KVS_HIDDEN size_t kvs_layout_pointer(const struct kvs_ggml *g, const struct ggml_tensor *t,
                                     const struct ggml_tensor *without, const void *pointer);

/* backend.c */
struct kvs_backend {
    char missing[160]; /* why there are none; empty when all were found */
    void *(*get_base)(struct ggml_backend_buffer *);
    size_t (*get_size)(struct ggml_backend_buffer *);
    const char *(*get_name)(struct ggml_backend_buffer *);
    bool (*is_host)(struct ggml_backend_buffer *);
    int (*tensor_alloc)(struct ggml_backend_buffer *, struct ggml_tensor *, void *);
    struct ggml_backend_buffer *(*alloc_buffer)(void *, size_t);
    void (*free_buffer)(struct ggml_backend_buffer *);
    void *(*cpu_type)(void);
    void *(*type_of)(struct ggml_backend_buffer *);
    void (*synchronize)(void *);
    size_t buffer; /* offset of the member */
};
/* Fills g->backend. NULL, or why it cannot be. */
KVS_HIDDEN const char *kvs_backend_find(struct kvs_ggml *g);
static inline struct ggml_backend_buffer *kvs_buffer(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    return *(struct ggml_backend_buffer *const *)(const void *)((const char *)t + g->backend->buffer);
}

/*
 * rotary.c: fills `out` with the frequency factors that take each pair's frequency along to its place. pairs[j] is twice the pair
 * that stands at place j, plus 1 where it is swapped; own are the model's factors, or NULL. False when one is out of range.
 */
KVS_HIDDEN bool kvs_rotary_factors(const struct kvs_rope *r, const uint16_t *pairs, size_t n, const float *own, float *out);

/* factors.c: gives a shielded model's frequency factors to a rotary embedding of its graph. */
struct kvs_opened;
KVS_HIDDEN void kvs_factors_give(struct kvs_ggml *g, struct ggml_tensor *rope, const struct kvs_opened *info);

/* fatal.c */
KVS_HIDDEN _Noreturn void kvs_die(const char *format, ...) __attribute__((format(printf, 1, 2)));
KVS_HIDDEN void kvs_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* session.c: the socket to the supervisor (KVSHIELD_SOCKET). Every call dies when it cannot be used. */
#define KVS_MARKER_MAX 64
#define KVS_FINGERPRINT_MAX 256
#define KVS_PAIRS_MAX 256
struct kvs_welcome {
    uint32_t transport, capacity, spin_us, timeout_ms;
    int fd;
};
struct kvs_dump_request {
    uint32_t number;
    int fd; /* a regular file: writing to it never waits for a reader, nor raises SIGPIPE */
};
/* Bytes of the shielded model that are the original's: whole pages, in the order of `to`. */
struct kvs_range {
    uint64_t from, to, length;
};
struct kvs_opened {
    uint32_t action, model, layers, row_floats;
    uint32_t rotary_dim;
    float rotary_base;
    char marker[KVS_MARKER_MAX];
    uint8_t fingerprint[KVS_FINGERPRINT_MAX];
    size_t fingerprint_len;
    uint16_t pairs[KVS_PAIRS_MAX]; /* which rotary pair stands where: as kvs_rotary_factors takes them */
    size_t pair_count;             /* 0 when the model's file has the factors */
    bool fixed_heads;              /* a bias that differs from head to head is right */
    struct kvs_range *overlay; /* belongs to whoever holds this struct */
    size_t overlays;
    int fd;
    char refusal[512]; /* set when action is KVS_ACTION_REFUSE */
};
enum { KVS_ACTION_REFUSE = 0, KVS_ACTION_SHIELD = 1, KVS_ACTION_PASS = 2, KVS_ACTION_RESIDE = 3, KVS_ACTION_CLEAR = 4 };
KVS_HIDDEN void kvs_session_begin(const char *engine_version);
KVS_HIDDEN void kvs_session_open(const char *path, int fd, struct kvs_opened *out);
KVS_HIDDEN void kvs_session_last_words(const char *message); /* best effort, before the end */
/* Whether this process runs as without kvshield, and the hook only looks. Known once the session has begun. */
KVS_HIDDEN bool kvs_session_observes(void);
/* Whether caches live in the enclave (mode resident), and whether what they were made from is wiped in the engine. */
KVS_HIDDEN bool kvs_session_resident(void);
KVS_HIDDEN bool kvs_session_scrubs(void);
KVS_HIDDEN bool kvs_session_dump_wanted(void);
/* Takes the request over; its descriptor is then the caller's, who answers it. */
KVS_HIDDEN bool kvs_session_take_dump(struct kvs_dump_request *out);
/* `refusal` is why there is no dump, NULL when it is complete. */
KVS_HIDDEN void kvs_session_dumped(uint32_t number, const char *refusal);

/* channel.c: the data plane. */
struct kvs_frame {
    uint32_t model, layer, rows, row_bytes;
};
KVS_HIDDEN void kvs_channel_attach(const struct kvs_welcome *w);
/* The largest number of rows that one frame carries. */
KVS_HIDDEN uint32_t kvs_channel_rows(uint32_t row_bytes);
/* Fetches rows with `get`, sends them through the enclave, stores the answer with `put`. */
typedef void (*kvs_rows_get)(void *user, void *rows, size_t bytes);
typedef void (*kvs_rows_put)(void *user, const void *rows, size_t bytes);
KVS_HIDDEN void kvs_channel_transition(const struct kvs_frame *f, kvs_rows_get get, kvs_rows_put put,
                                       void *user);

/* Requests of mode resident; their bodies are in docs/protocol.md. */
enum {
    KVS_DECLARE = 4, KVS_RELEASE, KVS_CLEAR, KVS_COPY, KVS_BATCH, KVS_ATTEND, KVS_ROTATE, KVS_KEEP, KVS_SEAL, KVS_UNSEAL
};
struct kvs_call {
    uint32_t type, id, layer, payload;
    uint32_t capacity, answer; /* bytes that fit; bytes that came back */
    int64_t start;
    uint64_t enclave_ns, sent; /* what the enclave took for it, and bytes, over all its frames */
    char refusal[513];
};
/* Takes the data plane and returns where the body goes; _try or _call sends it and returns the answer's body, _end gives the
 * data plane back. A refusal is fatal to _call; _try returns NULL and says why in call->refusal. Between begin and end one
 * more call may follow another. */
KVS_HIDDEN size_t kvs_channel_capacity(void);
KVS_HIDDEN uint8_t *kvs_channel_begin(struct kvs_call *call);
KVS_HIDDEN const uint8_t *kvs_channel_try(struct kvs_call *call);
KVS_HIDDEN const uint8_t *kvs_channel_call(struct kvs_call *call);
KVS_HIDDEN void kvs_channel_end(const struct kvs_call *call);

/* models.c: what was exchanged in this process. */
struct kvs_model {
    struct kvs_opened info;
    char *path;
    int64_t dev, ino, size, mtime_ns;
    int original;   /* the file that the engine asked for; -1 when nothing is taken from it */
    bool consumed;  /* mapped or read in a way that fills the holes */
    bool used; /* a graph of it has run, so no more opens of this load are expected */
    struct kvs_model *next;
};
/* Returns false when the file is none of our business; *refused when the supervisor said no. */
KVS_HIDDEN bool kvs_exchange(const char *path, struct kvs_model **model, bool *refused);
KVS_HIDDEN const char *kvs_refusal(void); /* why a model was refused last */
/* Whether any model needs frequency factors in its graphs. */
KVS_HIDDEN bool kvs_models_in_graph(void);
KVS_HIDDEN bool kvs_exchange_fd(int fd, bool *refused);
KVS_HIDDEN struct kvs_model *kvs_exchanged(const char *path);
/* The model whose memory file this descriptor is, if parts of it have to come from the original. */
KVS_HIDDEN struct kvs_model *kvs_model_of_file(int fd);
KVS_HIDDEN void kvs_model_consumed(struct kvs_model *m);
/* Makes the model's file whole, for an engine whose reads the hook does not see. */
KVS_HIDDEN void kvs_model_complete(struct kvs_model *m);
KVS_HIDDEN void kvs_model_path(const struct kvs_model *m, char *out, size_t len);
KVS_HIDDEN struct kvs_model *kvs_model_of_marker(const struct kvs_ggml *g, const struct ggml_tensor *t);
KVS_HIDDEN bool kvs_model_is_marker(const char *name);
/* Of the models that were opened in mode resident, for messages. */
KVS_HIDDEN const char *kvs_architectures(void);
KVS_HIDDEN void kvs_model_used(struct kvs_model *m);

/* overlay.c: a shielded model that shares what is unchanged with the original. */
KVS_HIDDEN void *kvs_overlay_map(const struct kvs_model *m, size_t len, int prot, int flags);
KVS_HIDDEN FILE *kvs_overlay_open(const struct kvs_model *m);
KVS_HIDDEN int kvs_overlay_fileno(FILE *file); /* -1 for a stream that is not one of these */

/* state.c: files that hold a saved cache. */
KVS_HIDDEN void kvs_state_saved(const char *path);
KVS_HIDDEN bool kvs_state_may_load(const char *path);

/* dump.c: writes the cache and its surroundings where the supervisor wants it, if it has asked and the graph is one with attention. */
KVS_HIDDEN void kvs_dump(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph);

/* caches.c: the KV caches whose rows are in the enclave, by the engine's tensor of keys. */
struct kvs_cache {
    const struct ggml_tensor *k, *v;
    struct ggml_backend_buffer *buffer;
    const void *context; /* of the engine, to which the cache belongs; NULL until a survey has shown it */
    uint32_t id, layer, heads, kv_heads, dim_k, dim_v, cells, streams, storage;
};
KVS_HIDDEN struct kvs_cache *kvs_cache_of(const struct ggml_tensor *k); /* by the tensor of keys */
KVS_HIDDEN struct kvs_cache *kvs_cache_at(size_t i);                    /* NULL behind the last one */
/* Makes the caches known that are not; false, with a message, when the enclave has no room for them. */
KVS_HIDDEN bool kvs_caches_declare(struct kvs_cache *list, size_t count);
/* The host's calls on buffers and tensors, before they are carried out. */
KVS_HIDDEN void kvs_buffer_cleared(struct ggml_backend_buffer *buffer);
KVS_HIDDEN void kvs_buffer_freed(struct ggml_backend_buffer *buffer);
/* True when both are cache rows and the copy was made in the enclave instead. */
KVS_HIDDEN bool kvs_tensor_copied(struct kvs_ggml *g, const struct ggml_tensor *from, const struct ggml_tensor *to);

/* record.c: true when the rows are a cache's and the access was noted instead of made. */
KVS_HIDDEN bool kvs_recorded(struct kvs_ggml *g, const struct ggml_tensor *t, size_t offset, size_t size);

/* resident.c: mode resident. */
struct kvs_plan;
/* Understands a graph: what in it reads and writes caches. Dies when it does not. *plan is made at the first call. */
KVS_HIDDEN bool kvs_resident_scan(struct kvs_ggml *g, struct ggml_cgraph *graph, struct kvs_plan **plan);
/* Completes the plan of a graph whose memory has been laid out. False when the enclave has no room for its caches. */
KVS_HIDDEN bool kvs_resident_prepare(struct kvs_ggml *g, struct kvs_plan *plan, struct ggml_cgraph *graph);
/* Takes attention and cache writes out of the graph; puts them back, and wipes what is left. */
KVS_HIDDEN void kvs_resident_begin(struct kvs_ggml *g, struct kvs_plan *plan);
KVS_HIDDEN void kvs_resident_end(struct kvs_ggml *g, struct kvs_plan *plan, void *sched);
KVS_HIDDEN bool kvs_resident_wants(const struct kvs_plan *plan, const struct ggml_tensor *t);
KVS_HIDDEN void kvs_resident_attend(struct kvs_ggml *g, struct kvs_plan *plan, const struct ggml_tensor *t);
/* The attention node that the engine passed over, or -1. */
KVS_HIDDEN long kvs_resident_missing(const struct kvs_plan *plan);
/* From a graph that is only measured. */
KVS_HIDDEN bool kvs_resident_reserve(struct kvs_ggml *g, struct ggml_cgraph *graph);

/* graph.c: entry points for the interposer. */
KVS_HIDDEN int kvs_graph_compute(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph);
KVS_HIDDEN void kvs_graph_laid_out(void *sched);
KVS_HIDDEN bool kvs_graph_reserve(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph);
KVS_HIDDEN void kvs_host_callback(struct kvs_ggml *g, void *sched, kvs_eval_callback cb, void *user);

#endif
