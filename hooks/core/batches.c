/*
 * Whose tokens a graph computes. The engine fills a batch with tokens of sequences, hands it in, and computes it in one graph
 * or several. Which tokens are in which graph is not said; it follows from how libllama cuts a batch: with one stream of cells, in
 * order; with a stream for each sequence, a token's cell tells its sequence.
 *
 * For information only. What is not understood is left out.
 */
#include "meter.h"

#include <pthread.h>
#include <stdlib.h>

#define BATCHES 64
#define TOKENS_MAX (1u << 20)

struct batch {
    const void *address; /* NULL: free */
    int32_t *sequences;
    size_t count, capacity;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct batch batches[BATCHES];

/* What this thread computes. */
static _Thread_local struct {
    int32_t *sequences;
    size_t count, capacity, done;
} input;

static bool push(int32_t **list, size_t *count, size_t *capacity, int32_t sequence)
{
    if (*count == *capacity) {
        size_t more = *capacity ? 2 * *capacity : 256;
        int32_t *grown = more <= TOKENS_MAX ? realloc(*list, more * sizeof *grown) : NULL;
        if (!grown)
            return false;
        *list = grown;
        *capacity = more;
    }
    (*list)[(*count)++] = sequence;
    return true;
}

static struct batch *find(const void *address, bool make)
{
    struct batch *unused = NULL;
    for (size_t i = 0; i < BATCHES; i++) {
        if (batches[i].address == address)
            return &batches[i];
        if (!batches[i].address)
            unused = &batches[i];
    }
    if (!make || !unused)
        return NULL;
    unused->address = address;
    unused->count = 0;
    return unused;
}

void kvs_batch_add(const void *address, int32_t sequence)
{
    pthread_mutex_lock(&lock);
    struct batch *b = find(address, true);
    if (b)
        push(&b->sequences, &b->count, &b->capacity, sequence);
    pthread_mutex_unlock(&lock);
}

void kvs_batch_clear(const void *address)
{
    pthread_mutex_lock(&lock);
    struct batch *b = find(address, false);
    if (b)
        b->count = 0;
    pthread_mutex_unlock(&lock);
}

void kvs_batch_free(const void *address)
{
    pthread_mutex_lock(&lock);
    struct batch *b = find(address, false);
    if (b) {
        free(b->sequences);
        *b = (struct batch){0};
    }
    pthread_mutex_unlock(&lock);
}

void kvs_batch_begin_sequences(const int32_t *sequences, size_t tokens)
{
    input.count = input.done = 0;
    for (size_t i = 0; i < tokens; i++)
        if (!push(&input.sequences, &input.count, &input.capacity, sequences[i]))
            input.count = 0;
}

void kvs_batch_begin(const void *address)
{
    input.count = input.done = 0;
    pthread_mutex_lock(&lock);
    struct batch *b = find(address, false);
    if (b)
        kvs_batch_begin_sequences(b->sequences, b->count);
    pthread_mutex_unlock(&lock);
}

struct kvs_cells kvs_graph_cells(const struct kvs_ggml *g, struct ggml_cgraph *graph)
{
    for (int i = 0, n = g->graph_n_nodes(graph); i < n; i++) {
        const struct ggml_tensor *node = g->graph_node(graph, i), *cache = kvs_base(g, node);
        if (cache == node || strncmp(kvs_name(g, cache), "cache_k_", 8) != 0 || strcmp(g->op_desc(node), "SET_ROWS") != 0)
            continue;
        const struct ggml_tensor *index = kvs_src(g, node, 1);
        const int64_t *ne = kvs_ne(g, cache);
        if (!index || kvs_ne(g, index)[0] <= 0 || kvs_ne(g, index)[0] > TOKENS_MAX || ne[1] <= 0 || ne[2] <= 0)
            break;
        size_t at = g->cache_heads ? 2 : 1; /* where the shape counts cells */
        return (struct kvs_cells){index, (uint32_t)kvs_ne(g, index)[0], (uint32_t)ne[at], (uint32_t)ne[at + 1]};
    }
    return (struct kvs_cells){0};
}

/* Returns how many parts there are then; 0 when there are too many. */
static size_t count_one(struct kvs_part *parts, size_t count, int32_t sequence)
{
    size_t i = 0;
    while (i < count && parts[i].sequence != sequence)
        i++;
    if (i == KVS_PARTS_MAX)
        return 0;
    if (i == count)
        parts[count++] = (struct kvs_part){sequence, 0};
    parts[i].tokens++;
    return count;
}

static size_t by_streams(const struct kvs_ggml *g, const struct kvs_cells *c, struct kvs_part *parts)
{
    int64_t *cells = malloc(c->tokens * sizeof *cells);
    if (!cells || g->nbytes(c->index) != c->tokens * sizeof *cells) {
        free(cells);
        return 0;
    }
    g->tensor_get(c->index, cells, 0, c->tokens * sizeof *cells);
    size_t count = 0;
    for (uint32_t i = 0; i < c->tokens && (i == 0 || count > 0); i++)
        count = count_one(parts, count, (int32_t)(cells[i] / c->cells));
    free(cells);
    return count;
}

size_t kvs_batch_parts(const struct kvs_ggml *g, const struct kvs_cells *c, struct kvs_part *parts)
{
    size_t left = input.count - input.done;
    if (c->tokens == 0 || c->tokens > left)
        return 0;
    size_t from = input.done, count = 0;
    input.done += c->tokens;
    if (c->tokens < input.count && c->streams > 1)
        return by_streams(g, c, parts);
    for (size_t i = 0; i < c->tokens && (i == 0 || count > 0); i++)
        count = count_one(parts, count, input.sequences[from + i]);
    return count;
}
