/*
 * Mode resident: keys and values go into the enclave as they are made, attention over them is computed there, and the engine's
 * cache stays zero. The engine's own attention and its writes into the cache are taken out of the graph.
 */
#include "plan.h"
#include "record.h"

#include <stdlib.h>

/* Finds the caches of the plan's steps, and declares those that are new. False when the enclave has no room. */
static bool find_caches(struct kvs_plan *p)
{
    struct kvs_cache *fresh = malloc((p->count + 1) * sizeof *fresh);
    size_t count = 0;
    if (!fresh)
        kvs_die("out of memory");
    for (size_t i = 0; i < p->count; i++) {
        struct kvs_step *s = &p->steps[i];
        s->cache = kvs_cache_of(s->k);
        if (s->cache || s->kind != KVS_STEP_ATTEND)
            continue;
        size_t j = 0;
        while (j < count && fresh[j].k != s->k)
            j++;
        if (j == count)
            fresh[count++] = s->shape;
    }
    bool ok = count == 0 || kvs_caches_declare(fresh, count);
    free(fresh);
    for (size_t i = 0; ok && count > 0 && i < p->count; i++)
        p->steps[i].cache = kvs_cache_of(p->steps[i].k);
    return ok;
}

/* Attention over a cache must look the same in every graph. */
static void check_caches(const struct kvs_plan *p)
{
    for (size_t i = 0; i < p->count; i++) {
        const struct kvs_cache *c = p->steps[i].cache, *s = &p->steps[i].shape;
        if (p->steps[i].kind == KVS_STEP_ATTEND &&
            (c->heads != s->heads || c->kv_heads != s->kv_heads || c->dim_k != s->dim_k || c->dim_v != s->dim_v ||
             c->cells != s->cells || c->streams != s->streams))
            kvs_die("layer %u of this engine changed its shape", c->layer);
    }
}

/* Steps of caches that no attention has used yet hold no rows. */
static void drop_unknown(struct kvs_plan *p)
{
    size_t kept = 0;
    for (size_t i = 0; i < p->count; i++)
        if (p->steps[i].cache)
            p->steps[kept++] = p->steps[i];
    p->count = kept;
}

bool kvs_resident_prepare(struct kvs_ggml *g, struct kvs_plan *p, struct ggml_cgraph *graph)
{
    if (!find_caches(p))
        return false;
    check_caches(p);
    drop_unknown(p);
    if (kvs_session_scrubs())
        kvs_scrub_plan(g, p, graph);
    kvs_plan_takes(p, g, graph);
    return true;
}

void kvs_resident_begin(struct kvs_ggml *g, struct kvs_plan *p)
{
    kvs_cells_change();
    p->next = 0;
    for (size_t i = 0; i < p->count; i++)
        p->steps[i].done = false;
    for (size_t i = 0; i < p->blank_count; i++)
        *kvs_op_of(g, p->blanks[i].node) = 0;
}

bool kvs_resident_reserve(struct kvs_ggml *g, struct ggml_cgraph *graph)
{
    struct kvs_plan *p = NULL;
    bool ok = !kvs_resident_scan(g, graph, &p) || find_caches(p);
    if (p) {
        free(p->writes);
        free(p->steps);
        free(p->blanks);
        free(p->scratch);
        free(p->leftovers);
        free(p);
    }
    return ok;
}

#define LOOK_AHEAD 8 /* a device's scheduler may change the order a little */

static struct kvs_step *step_of(const struct kvs_plan *p, const struct ggml_tensor *t)
{
    for (size_t i = p->next; i < p->count && i < p->next + LOOK_AHEAD; i++)
        if (p->steps[i].node == t && !p->steps[i].done)
            return &p->steps[i];
    return NULL;
}

bool kvs_resident_wants(const struct kvs_plan *p, const struct ggml_tensor *t)
{
    return step_of(p, t) != NULL;
}

void kvs_resident_attend(struct kvs_ggml *g, struct kvs_plan *p, const struct ggml_tensor *t)
{
    struct kvs_step *s = step_of(p, t);
    switch (s->kind) {
    case KVS_STEP_ROTATE:
        kvs_rotate(g, s);
        break;
    case KVS_STEP_TAKE:
        kvs_take(g, s);
        break;
    case KVS_STEP_ATTEND:
        kvs_attend(g, p, s);
        break;
    }
    s->done = true;
    while (p->next < p->count && p->steps[p->next].done)
        p->next++;
}

long kvs_resident_missing(const struct kvs_plan *p)
{
    return p->next < p->count ? (long)p->steps[p->next].cache->layer : -1;
}

void kvs_resident_end(struct kvs_ggml *g, struct kvs_plan *p, void *sched)
{
    /* The engine may compute the same graph again. */
    for (size_t i = 0; i < p->blank_count; i++)
        *kvs_op_of(g, p->blanks[i].node) = p->blanks[i].op;
    for (size_t i = 0; i < p->slot_count; i++)
        p->slots[i].sent = false;
    kvs_plan_forget(p);
    if (!kvs_session_scrubs() || p->slot_count == 0)
        return;
    g->backend->synchronize(sched);
    kvs_scrub_results(g, p);
}
