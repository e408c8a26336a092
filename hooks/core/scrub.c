/* Wiping what mode resident leaves in the engine: keys, values and queries once they are taken, results at the end of a graph. */
#include "plan.h"

#include <stdlib.h>

static const uint8_t zeros[64 << 10];

void kvs_wipe(struct kvs_ggml *g, const struct ggml_tensor *t, size_t at, size_t len)
{
    for (size_t n; len > 0; at += n, len -= n) {
        n = len < sizeof zeros ? len : sizeof zeros;
        g->tensor_set((struct ggml_tensor *)(uintptr_t)t, zeros, at, n);
    }
}

/* A tensor of rows is wiped as a whole when nothing but its rows lies in it. */
void kvs_wipe_rows(struct kvs_ggml *g, const struct ggml_tensor *t)
{
    const int64_t *ne = kvs_ne(g, t);
    const size_t *nb = kvs_nb(g, t);
    size_t floats = (size_t)(ne[0] * ne[1] * ne[2] * ne[3]), span = g->nbytes(t);
    if (span == floats * sizeof(float)) {
        kvs_wipe(g, t, 0, span);
        return;
    }
    for (int64_t i = 0; i < ne[1] * ne[2] * ne[3]; i++)
        kvs_wipe(g, t,
             (size_t)(i % ne[1]) * nb[1] + (size_t)(i / ne[1] % ne[2]) * nb[2] + (size_t)(i / ne[1] / ne[2]) * nb[3],
             (size_t)ne[0] * sizeof(float));
}

/* --- what may be wiped as soon as it has been taken --- */

struct use {
    const struct ggml_tensor *base;
    int last; /* node that reads it last */
};

static int by_base(const void *a, const void *b)
{
    const struct use *x = a, *y = b;
    return x->base < y->base ? -1 : x->base > y->base;
}

static struct use *use_of(struct use *uses, size_t n, const struct ggml_tensor *base)
{
    struct use key = {base, 0};
    return bsearch(&key, uses, n, sizeof *uses, by_base);
}

/* --- what a graph leaves behind --- */

struct range {
    const char *from, *to;
    const struct ggml_tensor *tensor; /* that lies there */
    struct ggml_backend_buffer *buffer;
};

static int by_place(const void *a, const void *b)
{
    const struct range *x = a, *y = b;
    if (x->buffer != y->buffer)
        return x->buffer < y->buffer ? -1 : 1;
    return x->from < y->from ? -1 : x->from > y->from;
}

static void add_range(struct kvs_ggml *g, struct range *list, size_t *n, const struct ggml_tensor *t)
{
    struct ggml_backend_buffer *buffer = kvs_buffer(g, t);
    const char *from = g->get_data(t);
    if (buffer && from)
        list[(*n)++] = (struct range){from, from + g->nbytes(t), t, buffer};
}

static void leave(struct kvs_plan *p, const struct ggml_tensor *t, size_t at, size_t len)
{
    if (p->leftover_count == p->leftover_capacity) {
        p->leftover_capacity = p->leftover_capacity ? 2 * p->leftover_capacity : 64;
        p->leftovers = realloc(p->leftovers, p->leftover_capacity * sizeof *p->leftovers);
        if (!p->leftovers)
            kvs_die("out of memory");
    }
    p->leftovers[p->leftover_count++] = (struct kvs_leftover){t, at, len};
}

/* Notes a range except for what the graph was computed for. */
static void leave_range(struct kvs_ggml *g, struct kvs_plan *p, const struct range *r, const struct range *outputs, size_t count)
{
    const char *origin = g->get_data(r->tensor);
    const char *from = r->from;
    while (from < r->to) {
        const char *to = r->to, *next = r->to;
        for (size_t i = 0; i < count; i++) {
            if (outputs[i].buffer != r->buffer || outputs[i].to <= from || outputs[i].from >= to)
                continue;
            to = outputs[i].from > from ? outputs[i].from : from;
            next = outputs[i].to;
        }
        if (to > from)
            leave(p, r->tensor, (size_t)(from - origin), (size_t)(to - from));
        from = next > to ? next : to;
        if (to == r->to)
            break;
    }
}

#define OUTPUTS_MAX 64

/* The memory in which the graph's nodes have their results. */
static void plan_results(struct kvs_ggml *g, struct kvs_plan *p, struct ggml_cgraph *graph)
{
    int nodes = g->graph_n_nodes(graph);
    struct range outputs[OUTPUTS_MAX], *list = malloc(((size_t)nodes * 3 + 1) * sizeof *list);
    size_t count = 0, n = 0;
    if (!list)
        kvs_die("out of memory");
    for (int i = 0; i < nodes; i++) {
        const struct ggml_tensor *node = g->graph_node(graph, i);
        if (kvs_is_output(g, node) || i == nodes - 1) {
            if (count == OUTPUTS_MAX)
                kvs_die("a graph has more than %d outputs", OUTPUTS_MAX);
            add_range(g, outputs, &count, kvs_base(g, node));
        } else if (!kvs_view_src(g, node)) {
            add_range(g, list, &n, node);
        }
        for (int j = 0; j < 2; j++) { /* copies of results on another device */
            const struct ggml_tensor *src = kvs_src(g, node, j);
            if (src && strchr(kvs_name(g, src), '#') && !kvs_view_src(g, src))
                add_range(g, list, &n, src);
        }
    }
    qsort(list, n, sizeof *list, by_place);
    const char *done = NULL;
    for (size_t i = 0; i < n; i++) {
        struct range r = list[i];
        if (i > 0 && list[i - 1].buffer == r.buffer && done > r.from)
            r.from = done;
        if (r.from >= r.to)
            continue;
        leave_range(g, p, &r, outputs, count);
        done = r.to;
    }
    free(list);
    struct range tokens[1];
    size_t found = 0;
    if (p->tokens)
        add_range(g, tokens, &found, p->tokens);
    if (found) /* the engine may have given their memory to a result */
        leave_range(g, p, tokens, outputs, count);
}

/* What no later node reads can be wiped as soon as it has been taken. */
static void plan_sources(struct kvs_ggml *g, struct kvs_plan *p, struct ggml_cgraph *graph)
{
    size_t n = 0;
    struct use *uses = malloc((3 * p->count + 1) * sizeof *uses);
    if (!uses)
        kvs_die("out of memory");
    for (size_t i = 0; i < p->count; i++) {
        const struct kvs_step *s = &p->steps[i];
        if (s->kind != KVS_STEP_ATTEND)
            continue;
        uses[n++] = (struct use){kvs_base(g, s->q), -1};
        if (s->keys) {
            uses[n++] = (struct use){kvs_base(g, s->keys->source), -1};
            uses[n++] = (struct use){kvs_base(g, s->values->source), -1};
        }
    }
    qsort(uses, n, sizeof *uses, by_base);
    for (int i = 0, nodes = g->graph_n_nodes(graph); i < nodes; i++) {
        struct ggml_tensor *node = g->graph_node(graph, i);
        if (kvs_op(g, node) == KVS_OP_NOTHING)
            continue;
        for (int j = 0; j < KVS_GGML_MAX_SRC; j++) {
            const struct ggml_tensor *src = kvs_src(g, node, j);
            struct use *u = src ? use_of(uses, n, kvs_base(g, src)) : NULL;
            if (u)
                u->last = i;
        }
    }
    for (size_t i = 0; i < p->count; i++) {
        struct kvs_step *s = &p->steps[i];
        if (s->kind != KVS_STEP_ATTEND)
            continue;
        s->scrub_q = use_of(uses, n, kvs_base(g, s->q))->last <= s->at;
        struct kvs_write *both[2] = {s->keys, s->values};
        for (int j = 0; j < 2; j++)
            if (both[j])
                both[j]->scrub = use_of(uses, n, kvs_base(g, both[j]->source))->last <= both[j]->at;
    }
    free(uses);
}

void kvs_scrub_plan(struct kvs_ggml *g, struct kvs_plan *p, struct ggml_cgraph *graph)
{
    p->leftover_count = 0;
    plan_sources(g, p, graph);
    plan_results(g, p, graph);
}

void kvs_scrub_results(struct kvs_ggml *g, const struct kvs_plan *p)
{
    for (size_t i = 0; i < p->leftover_count; i++)
        kvs_wipe(g, p->leftovers[i].tensor, p->leftovers[i].at, p->leftovers[i].len);
}
