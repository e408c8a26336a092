/* A context shift in mode resident: the enclave turns the keys that it keeps, as the engine would have turned those in its cache. */
#include "plan.h"

#include <stdlib.h>

struct rotate_head {
    uint32_t first, count, dims, mode, context;
    float base, scale, ext_factor, attn_factor, beta_fast, beta_slow;
    uint32_t factors, hadamard, from, reserved[2];
};
_Static_assert(sizeof(struct rotate_head) == 64, "the head of a rotation is 64 bytes on the wire");

/* The size of the matrix, which must be the orthonormal Walsh-Hadamard matrix. */
static uint32_t hadamard_of(struct kvs_ggml *g, const struct ggml_tensor *matrix)
{
    size_t n = (size_t)kvs_ne(g, matrix)[0];
    float *m = g->nbytes(matrix) == n * n * sizeof *m ? malloc(n * n * sizeof *m) : NULL;
    if (!m)
        kvs_die("cached keys are multiplied by a matrix that kvshield does not know");
    g->tensor_get(matrix, m, 0, n * n * sizeof *m);
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) {
            float sign = __builtin_parityll(i & j) ? -1 : 1, off = m[i * n + j] * sign * (float)n - m[0] * (float)n;
            if (off > 1e-4f || off < -1e-4f || m[0] * m[0] * (float)n < 0.999f || m[0] * m[0] * (float)n > 1.001f)
                kvs_die("cached keys are multiplied by a matrix that kvshield does not know");
        }
    free(m);
    return (uint32_t)n;
}

/* The first row of a head that is turned: where the rotated view begins in the cache. */
static uint32_t first_row(struct kvs_ggml *g, const struct kvs_step *s)
{
    const struct ggml_tensor *view = kvs_src(g, s->node, 0);
    size_t row = kvs_nb(g, s->k)[1], all = (size_t)kvs_ne(g, s->k)[0];
    if (g->cache_heads || s->hadamard || (size_t)(kvs_ne(g, view)[0] * kvs_ne(g, view)[1]) == all)
        return 0;
    return (uint32_t)((size_t)((const char *)g->get_data(view) - (const char *)g->get_data(s->k)) * all / row);
}

void kvs_rotate(struct kvs_ggml *g, const struct kvs_step *s)
{
    const struct ggml_tensor *shift = kvs_src(g, s->node, 1), *factors = kvs_src(g, s->node, 2);
    uint32_t end = s->first + s->visible;
    if (g->nbytes(shift) != s->visible * sizeof(int32_t))
        kvs_die("a context shift of layer %u has %zu bytes for %u cells", s->cache->layer, g->nbytes(shift), s->visible);
    size_t factor_bytes = factors ? g->nbytes(factors) : 0;
    struct rotate_head h = {.first = s->first,
                            .dims = (uint32_t)kvs_param(g, s->node, 1),
                            .mode = (uint32_t)kvs_param(g, s->node, 2),
                            .context = (uint32_t)kvs_param(g, s->node, 4),
                            .base = kvs_paramf(g, s->node, 5),
                            .scale = kvs_paramf(g, s->node, 6),
                            .ext_factor = kvs_paramf(g, s->node, 7),
                            .attn_factor = kvs_paramf(g, s->node, 8),
                            .beta_fast = kvs_paramf(g, s->node, 9),
                            .beta_slow = kvs_paramf(g, s->node, 10),
                            .factors = (uint32_t)(factor_bytes / sizeof(float)),
                            .hadamard = s->hadamard ? hadamard_of(g, s->hadamard) : 0,
                            .from = first_row(g, s)};
    struct kvs_call call = {.type = KVS_ROTATE, .id = s->cache->id, .layer = s->cache->layer};
    uint8_t *body = kvs_channel_begin(&call);
    if (call.capacity < sizeof h + factor_bytes + sizeof(int32_t))
        kvs_die("a context shift does not fit the data plane; start kvshield with a larger --data-plane-bytes");
    for (; h.first < end; h.first += h.count) {
        h.count = kvs_at_most(end - h.first, call.capacity - sizeof h - factor_bytes, sizeof(int32_t));
        size_t n = h.count * sizeof(int32_t);
        memcpy(body, &h, sizeof h);
        g->tensor_get(shift, body + sizeof h, (h.first - s->first) * sizeof(int32_t), n);
        if (factors)
            g->tensor_get(factors, body + sizeof h + n, 0, factor_bytes);
        call.payload = (uint32_t)(sizeof h + n + factor_bytes);
        kvs_channel_call(&call);
    }
    kvs_channel_end(&call);
}
