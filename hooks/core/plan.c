/* A plan's lists, and what of it depends on how a graph's memory is laid out. scan.c fills it. */
#include "plan.h"

#include <stdlib.h>

enum kvs_op kvs_op(struct kvs_ggml *g, const struct ggml_tensor *t)
{
    static const struct {
        const char *name;
        enum kvs_op op;
    } known[] = {
        {"NONE", KVS_OP_NOTHING},      {"VIEW", KVS_OP_NOTHING},      {"RESHAPE", KVS_OP_NOTHING}, {"PERMUTE", KVS_OP_NOTHING},
        {"TRANSPOSE", KVS_OP_NOTHING}, {"SET_ROWS", KVS_OP_SET_ROWS}, {"FLASH_ATTN_EXT", KVS_OP_FLASH},
        {"MUL_MAT", KVS_OP_MUL_MAT},   {"SOFT_MAX", KVS_OP_SOFT_MAX}, {"SCALE", KVS_OP_SCALE},     {"CPY", KVS_OP_COPY},
        {"CONT", KVS_OP_COPY},         {"DUP", KVS_OP_COPY},          {"ROPE", KVS_OP_ROPE},
    };
    int number = *kvs_op_of(g, t);
    if (number < 0 || number >= (int)sizeof g->ops)
        return KVS_OP_OTHER;
    if (g->ops[number] == KVS_OP_UNSEEN) {
        const char *name = g->op_desc(t);
        uint8_t op = KVS_OP_OTHER;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            if (strcmp(name, known[i].name) == 0)
                op = (uint8_t)known[i].op;
        g->ops[number] = op;
    }
    return g->ops[number];
}

void *kvs_plan_more(void *list, size_t count, size_t *capacity, size_t size)
{
    if (count < *capacity)
        return list;
    *capacity = *capacity ? 2 * *capacity : 64;
    list = realloc(list, *capacity * size);
    if (!list)
        kvs_die("out of memory");
    return list;
}

uint8_t *kvs_plan_scratch(struct kvs_plan *p, size_t size)
{
    if (p->scratch_size < size) {
        free(p->scratch);
        p->scratch = malloc(size);
        p->scratch_size = size;
        if (!p->scratch)
            kvs_die("out of memory");
    }
    return p->scratch;
}

struct kvs_step *kvs_plan_add_step(struct kvs_plan *p, enum kvs_step_kind kind, struct ggml_tensor *node, int at)
{
    p->steps = kvs_plan_more(p->steps, p->count, &p->capacity, sizeof *p->steps);
    p->steps[p->count] = (struct kvs_step){.kind = kind, .node = node, .at = at};
    return &p->steps[p->count++];
}

void kvs_plan_forget(struct kvs_plan *p)
{
    for (size_t i = 0; i < p->write_count; i++) {
        if (!p->writes[i].rows)
            continue;
        memset(p->writes[i].rows, 0, p->writes[i].size);
        free(p->writes[i].rows);
        p->writes[i].rows = NULL;
    }
}

static bool overlap(struct kvs_ggml *g, const struct ggml_tensor *a, const struct ggml_tensor *b)
{
    const char *x = g->get_data(a), *y = g->get_data(b);
    return kvs_buffer(g, kvs_base(g, a)) == kvs_buffer(g, kvs_base(g, b)) && x < y + g->nbytes(b) && y < x + g->nbytes(a);
}

/*
 * Keys and values are read when the queries are ready, some nodes after the engine itself would have read them. In between the
 * engine may use their memory for something else. Which nodes those are is known on the CPU only: for a device the scheduler
 * changes the order.
 */
static bool is_short_lived(struct kvs_ggml *g, struct ggml_cgraph *graph, const struct kvs_write *w, int until)
{
    if (!g->backend->is_host(kvs_buffer(g, kvs_base(g, w->source))))
        return true;
    for (int i = w->at + 1; i < until; i++) {
        struct ggml_tensor *node = g->graph_node(graph, i);
        if (kvs_op(g, node) != KVS_OP_NOTHING && overlap(g, node, w->source))
            return true;
    }
    return false;
}

static int by_place(const void *a, const void *b)
{
    return ((const struct kvs_step *)a)->at - ((const struct kvs_step *)b)->at;
}

/* The graph's memory must have been laid out, and what is taken out of it marked. */
void kvs_plan_takes(struct kvs_plan *p, struct kvs_ggml *g, struct ggml_cgraph *graph)
{
    size_t attentions = p->count;
    for (size_t i = 0; i < attentions; i++) {
        struct kvs_write *both[2] = {p->steps[i].keys, p->steps[i].values};
        for (int j = 0; j < 2; j++) {
            struct kvs_cache *cache = p->steps[i].cache;
            if (!both[j] || (j == 1 && both[1] == both[0]) || !is_short_lived(g, graph, both[j], p->steps[i].at))
                continue;
            both[j]->early = true;
            struct kvs_step *s = kvs_plan_add_step(p, KVS_STEP_TAKE, both[j]->node, both[j]->at);
            s->take = both[j];
            s->cache = cache;
        }
    }
    if (p->count > attentions)
        qsort(p->steps, p->count, sizeof *p->steps, by_place);
}
