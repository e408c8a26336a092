/*
 * Which cells of its caches the engine reads or writes while it saves or restores a state, and which it still uses at all.
 *
 * The engine alone knows which cell belongs to which sequence, and it says so nowhere; but asked for a state, through its
 * public functions, it reads the rows of exactly the cells that are in use. Nothing is read then: only what is asked for is noted.
 */
#include "record.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

static _Thread_local struct kvs_record *recording;
static _Thread_local int own_calls;

bool kvs_own_call(void)
{
    return own_calls > 0;
}

void kvs_own_calls(int change)
{
    own_calls += change;
}

void kvs_record_begin(struct kvs_record *r)
{
    *r = (struct kvs_record){0};
    recording = r;
}

void kvs_record_end(void)
{
    recording = NULL;
}

void kvs_record_free(struct kvs_record *r)
{
    for (size_t i = 0; i < r->count; i++)
        free(r->layers[i].cells);
    free(r->layers);
    *r = (struct kvs_record){0};
}

static struct kvs_recorded *layer_of(struct kvs_record *r, struct kvs_cache *c)
{
    for (size_t i = 0; i < r->count; i++)
        if (r->layers[i].cache == c)
            return &r->layers[i];
    r->layers = realloc(r->layers, (r->count + 1) * sizeof *r->layers);
    if (!r->layers)
        kvs_die("out of memory");
    r->layers[r->count] = (struct kvs_recorded){.cache = c};
    return &r->layers[r->count++];
}

static void note(struct kvs_recorded *l, int64_t first, size_t n)
{
    if (l->count + n > l->capacity) {
        l->capacity = 2 * (l->count + n);
        l->cells = realloc(l->cells, l->capacity * sizeof *l->cells);
        if (!l->cells)
            kvs_die("out of memory");
    }
    for (size_t i = 0; i < n; i++)
        l->cells[l->count++] = first + (int64_t)i;
}

bool kvs_recorded(struct kvs_ggml *g, const struct ggml_tensor *t, size_t offset, size_t size)
{
    if (!recording)
        return false;
    const struct ggml_tensor *base = kvs_base(g, t);
    if (!kvs_is_cache(kvs_name(g, base)))
        return false;
    struct kvs_cache *c = kvs_cache_of(base);
    if (!c)
        return true; /* values, which go with their keys; or a cache in which nothing was computed yet */
    size_t row = kvs_nb(g, base)[1];
    offset += (size_t)((const char *)g->get_data(t) - (const char *)g->get_data(base));
    if (offset % row != 0 || size % row != 0)
        kvs_die("the engine saves or restores its cache in a way that kvshield does not know");
    note(layer_of(recording, c), (int64_t)(offset / row), size / row);
    return true;
}

static _Atomic uint64_t changes;

void kvs_cells_change(void)
{
    changes++;
}

uint64_t kvs_cells_changes(void)
{
    return changes;
}

/* --- cells in use --- */

#define CONTEXTS_MAX 256
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    const void *memory, *context;
} contexts[CONTEXTS_MAX];
static size_t context_count;

void kvs_context_memory(const void *context, const void *memory)
{
    pthread_mutex_lock(&lock);
    size_t i = 0;
    while (i < context_count && contexts[i].memory != memory)
        i++;
    if (i < CONTEXTS_MAX) {
        contexts[i].memory = memory;
        contexts[i].context = context;
        if (i == context_count)
            context_count++;
    }
    pthread_mutex_unlock(&lock);
}

void kvs_context_freed(const void *context)
{
    pthread_mutex_lock(&lock);
    size_t kept = 0;
    for (size_t i = 0; i < context_count; i++)
        if (contexts[i].context != context)
            contexts[kept++] = contexts[i];
    context_count = kept;
    pthread_mutex_unlock(&lock);
}

static const void *context_of(const void *memory)
{
    const void *context = NULL;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < context_count; i++)
        if (contexts[i].memory == memory)
            context = contexts[i].context;
    pthread_mutex_unlock(&lock);
    return context;
}

/* Notes the cells in use in a context, and whose its caches are. */
static bool survey(const struct kvs_states *f, const void *context, struct kvs_record *r)
{
    kvs_own_calls(1);
    size_t size = f->get_size(context), got = 0;
    uint8_t *state = calloc(1, size + 1);
    kvs_record_begin(r);
    if (state)
        got = f->get_data(context, state, size);
    kvs_record_end();
    kvs_own_calls(-1);
    free(state);
    for (size_t i = 0; i < r->count; i++)
        r->layers[i].cache->context = context;
    return got > 0;
}

void kvs_cells_keep(const struct kvs_cache *c, const uint32_t *bits)
{
    uint32_t cells = c->cells * c->streams;
    struct kvs_call call = {.type = KVS_KEEP, .id = c->id, .layer = c->layer};
    uint8_t *body = kvs_channel_begin(&call);
    size_t most = (call.capacity - 8) / 4 * 32;
    for (uint32_t first = 0, n; first < cells; first += n) {
        n = cells - first < most ? cells - first : (uint32_t)most;
        size_t words = (n + 31) / 32;
        memcpy(body, &first, sizeof first);
        memcpy(body + 4, &n, sizeof n);
        memcpy(body + 8, bits + first / 32, 4 * words);
        call.payload = (uint32_t)(8 + 4 * words);
        kvs_channel_call(&call);
    }
    kvs_channel_end(&call);
}

static void keep(const struct kvs_cache *c, const struct kvs_recorded *used)
{
    uint32_t cells = c->cells * c->streams;
    uint32_t *bits = calloc((cells + 31) / 32 + 1, sizeof *bits);
    if (!bits)
        kvs_die("out of memory");
    for (size_t i = 0; used && i < used->count; i++)
        if (used->cells[i] >= 0 && used->cells[i] < cells)
            bits[used->cells[i] / 32] |= 1u << (used->cells[i] % 32);
    kvs_cells_keep(c, bits);
    free(bits);
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void kvs_cells_removing(const struct kvs_states *f, const void *memory)
{
    const void *context = context_of(memory);
    const struct kvs_cache *c;
    bool unknown = false;
    for (size_t i = 0; (c = kvs_cache_at(i)); i++)
        unknown |= c->context == NULL;
    if (!context || !unknown)
        return;
    struct kvs_record r;
    survey(f, context, &r);
    kvs_record_free(&r);
}

#define PAUSE_MS 200 /* between two surveys for the sake of a tail that the next tokens overwrite */

void kvs_cells_removed(const struct kvs_states *f, const void *memory, bool whole)
{
    static _Atomic int64_t last;
    const void *context = context_of(memory);
    kvs_cells_change();
    if (!context || (!whole && now_ms() - last < PAUSE_MS))
        return;
    struct kvs_record r;
    bool known = survey(f, context, &r);
    struct kvs_cache *c;
    for (size_t i = 0; known && (c = kvs_cache_at(i)); i++) {
        const struct kvs_recorded *used = NULL;
        for (size_t j = 0; j < r.count; j++)
            if (r.layers[j].cache == c)
                used = &r.layers[j];
        if (c->context == context)
            keep(c, used);
    }
    kvs_record_free(&r);
    last = now_ms();
}
