/* The KV caches of this process whose rows lie in the enclave (mode resident). The engine's own tensors stay zero. */
#include "kvs.h"

#include <pthread.h>
#include <stdlib.h>

#define CACHES_MAX 8192

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* Read by the threads that compute, changed by whichever thread makes or frees a context; entries never move. */
static struct kvs_cache *caches[CACHES_MAX];
static size_t count;

struct kvs_cache *kvs_cache_of(const struct ggml_tensor *k)
{
    pthread_mutex_lock(&lock);
    struct kvs_cache *found = NULL;
    for (size_t i = count; i-- > 0 && !found;)
        if (caches[i]->k == k)
            found = caches[i];
    pthread_mutex_unlock(&lock);
    return found;
}

struct kvs_cache *kvs_cache_at(size_t i)
{
    pthread_mutex_lock(&lock);
    struct kvs_cache *c = i < count ? caches[i] : NULL;
    pthread_mutex_unlock(&lock);
    return c;
}

static void add(const struct kvs_cache *c)
{
    struct kvs_cache *copy = malloc(sizeof *copy);
    if (!copy)
        kvs_die("out of memory");
    *copy = *c;
    pthread_mutex_lock(&lock);
    if (count == CACHES_MAX)
        kvs_die("more than %d layers have a cache in this process", CACHES_MAX);
    caches[count++] = copy;
    pthread_mutex_unlock(&lock);
}

static void put32(uint8_t *at, size_t i, uint32_t v)
{
    memcpy(at + 4 * i, &v, sizeof v);
}

static uint64_t get64(const uint8_t *at)
{
    uint64_t v;
    memcpy(&v, at, sizeof v);
    return v;
}

bool kvs_caches_declare(struct kvs_cache *list, size_t n)
{
    struct kvs_call call = {.type = KVS_DECLARE, .layer = list->layer};
    uint8_t *body = kvs_channel_begin(&call);
    if (8 + 32 * n > call.capacity)
        kvs_die("%zu layers do not fit the data plane (%u bytes); start kvshield with a larger --data-plane-bytes", n,
                call.capacity);
    call.payload = (uint32_t)(8 + 32 * n);
    put32(body, 0, (uint32_t)n);
    put32(body, 1, 0);
    for (size_t i = 0; i < n; i++) {
        const struct kvs_cache *c = &list[i];
        const uint32_t entry[8] = {c->layer, c->heads, c->kv_heads, c->dim_k, c->dim_v, c->cells, c->streams, c->storage};
        memcpy(body + 8 + 32 * i, entry, sizeof entry);
    }
    const uint8_t *answer = kvs_channel_call(&call);
    if (call.answer != 32)
        kvs_die("the enclave's answer for a cache has %u bytes", call.answer);
    uint8_t copy[32];
    memcpy(copy, answer, sizeof copy);
    kvs_channel_end(&call);
    uint32_t refused, first;
    memcpy(&refused, copy, sizeof refused);
    memcpy(&first, copy + 4, sizeof first);
    if (refused) {
        kvs_say("error: the KV cache of this context needs %llu MiB in the enclave, where %llu of %llu MiB are taken; use a smaller "
                "context (-c), --enclave-storage q8_0, or a larger --enclave-memory",
                (unsigned long long)((get64(copy + 8) + (1 << 20) - 1) >> 20), (unsigned long long)(get64(copy + 16) >> 20),
                (unsigned long long)(get64(copy + 24) >> 20));
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        list[i].id = first + (uint32_t)i;
        add(&list[i]);
    }
    return true;
}

static void order(uint32_t type, const struct kvs_cache *c, const uint32_t *words, size_t n)
{
    struct kvs_call call = {.type = type, .id = c->id, .layer = c->layer, .payload = (uint32_t)(4 * n)};
    uint8_t *body = kvs_channel_begin(&call);
    if (n > 0)
        memcpy(body, words, 4 * n);
    kvs_channel_call(&call);
    kvs_channel_end(&call);
}

void kvs_buffer_cleared(struct ggml_backend_buffer *buffer)
{
    const struct kvs_cache *c;
    for (size_t i = 0; (c = kvs_cache_at(i)); i++)
        if (c->buffer == buffer)
            order(KVS_CLEAR, c, NULL, 0);
}

void kvs_buffer_freed(struct ggml_backend_buffer *buffer)
{
    pthread_mutex_lock(&lock);
    size_t kept = 0, gone = 0;
    struct kvs_cache **list = malloc(count * sizeof *list + 1);
    if (!list)
        kvs_die("out of memory");
    for (size_t i = 0; i < count; i++)
        if (caches[i]->buffer == buffer)
            list[gone++] = caches[i];
        else
            caches[kept++] = caches[i];
    count = kept;
    pthread_mutex_unlock(&lock);
    for (size_t i = 0; i < gone; i++) {
        order(KVS_RELEASE, list[i], NULL, 0);
        free(list[i]);
    }
    free(list);
}

/* The stream that a view of one stream's rows begins with. */
static uint32_t stream_of(struct kvs_ggml *g, const struct ggml_tensor *view, const struct ggml_tensor *base)
{
    size_t stride = kvs_nb(g, base)[2];
    size_t offset = (size_t)((const char *)g->get_data(view) - (const char *)g->get_data(base));
    if (stride == 0 || offset % stride != 0 || g->nbytes(view) != stride)
        kvs_die("%s is copied in a way that kvshield does not know", kvs_name(g, base));
    return (uint32_t)(offset / stride);
}

bool kvs_tensor_copied(struct kvs_ggml *g, const struct ggml_tensor *from, const struct ggml_tensor *to)
{
    const struct ggml_tensor *source = kvs_base(g, from), *target = kvs_base(g, to);
    if (!kvs_is_cache(kvs_name(g, target)))
        return false; /* what is read from a cache are zeros */
    const struct kvs_cache *c = NULL;
    bool values = false;
    for (size_t i = 0; (c = kvs_cache_at(i)); i++) {
        values = c->v == target && c->k != target;
        if (c->k == target || values)
            break;
    }
    if (!c && !kvs_cache_of(source))
        return false; /* of a context that has computed nothing yet: there are no rows */
    if (source != target)
        kvs_die("%s is copied to %s: kvshield does not know how to follow that", kvs_name(g, source), kvs_name(g, target));
    if (!values) { /* the enclave keeps a cell's key and value together: copied with the key */
        const uint32_t streams[2] = {stream_of(g, from, source), stream_of(g, to, target)};
        order(KVS_COPY, c, streams, 2);
    }
    return true;
}
