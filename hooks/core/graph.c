/*
 * The engine's graphs on their way to be computed: each is understood once, by permute.c or by scan.c, and followed node by node.
 */
#include "meter.h"
#include "permute.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* What the hook knows of one scheduler, that is of one context of the engine. */
struct sched_state {
    void *sched;
    struct kvs_ggml *g;
    kvs_eval_callback host; /* installed by the host itself; NULL for none */
    void *host_user;
    bool host_wants, host_stopped;
    struct kvs_inversion permute;
    struct kvs_plan *plan; /* mode resident's; NULL in mode permute */
    bool resident;         /* the graph being computed has steps of the plan */
    struct ggml_cgraph *graph; /* that was understood last; the engine computes it again until it lays out another one */
    struct kvs_cells cells; /* of that graph */
    bool laid_out;          /* another one, since then */
    bool says_so;           /* the engine lays out graphs through a function that the hook sees */
    struct sched_state *link;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sched_state *states;

static struct sched_state *state_of(struct kvs_ggml *g, void *sched)
{
    pthread_mutex_lock(&lock);
    struct sched_state *s = states;
    while (s && s->sched != sched)
        s = s->link;
    if (!s) {
        s = calloc(1, sizeof *s);
        if (!s)
            kvs_die("out of memory");
        s->sched = sched;
        s->link = states;
        states = s;
    }
    s->g = s->permute.g = g;
    pthread_mutex_unlock(&lock);
    return s;
}

static bool wants(const struct sched_state *s, const struct ggml_tensor *t)
{
    return s->resident ? kvs_resident_wants(s->plan, t) : kvs_permute_wants(&s->permute, t);
}

/* The scheduler asks about every node, and calls again once a wanted one has been computed. */
static bool evaluate(struct ggml_tensor *t, bool ask, void *user)
{
    struct sched_state *s = user;
    bool ours = wants(s, t);
    if (ask) {
        s->host_wants = s->host && s->host(t, true, s->host_user);
        return ours || s->host_wants;
    }
    if (ours && s->resident)
        kvs_resident_attend(s->g, s->plan, t);
    else if (ours)
        kvs_permute_invert(&s->permute);
    if (s->host_wants && !s->host(t, false, s->host_user)) {
        s->host_stopped = true;
        return false;
    }
    return true;
}

static long missing_layer(const struct sched_state *s)
{
    return s->resident ? kvs_resident_missing(s->plan) : kvs_permute_missing(&s->permute);
}

#define KVS_GGML_STATUS_ALLOC_FAILED (-2)

/* Goes through the graph, unless it is the one before. False when the enclave has no room for its caches. */
static bool understand(struct sched_state *s, struct ggml_cgraph *graph)
{
    if (s->says_so && !s->laid_out && s->graph == graph) {
        s->permute.next = 0;
        return true;
    }
    s->permute.count = 0;
    s->resident = false;
    s->graph = NULL;
    s->laid_out = false;
    if (kvs_session_resident())
        s->resident = kvs_resident_scan(s->g, graph, &s->plan);
    else if (!kvs_session_observes())
        kvs_permute_scan(&s->permute, graph);
    if (s->resident && !kvs_resident_prepare(s->g, s->plan, graph))
        return false;
    s->graph = graph;
    s->cells = kvs_graph_cells(s->g, graph);
    return true;
}

static int compute(struct sched_state *s, struct ggml_cgraph *graph)
{
    struct kvs_part parts[KVS_PARTS_MAX];
    size_t count = kvs_batch_parts(s->g, &s->cells, parts);
    kvs_meter_begin(kvs_now_ns());
    s->host_stopped = false;
    s->g->set_eval_callback(s->sched, evaluate, s);
    int status = s->g->graph_compute_async(s->sched, graph);
    kvs_meter_end(kvs_now_ns(), s->cells.tokens, parts, count);
    return status;
}

int kvs_graph_compute(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph)
{
    struct sched_state *s = state_of(g, sched);
    if (!understand(s, graph))
        return KVS_GGML_STATUS_ALLOC_FAILED;
    kvs_dump(g, sched, graph);
    if (s->resident)
        kvs_resident_begin(g, s->plan);
    if (s->permute.count == 0 && !s->resident) {
        g->set_eval_callback(sched, s->host, s->host_user);
        return g->graph_compute_async(sched, graph);
    }
    int status = compute(s, graph);
    long missing = missing_layer(s);
    if (status == KVS_GGML_STATUS_SUCCESS && missing >= 0 && !s->host_stopped)
        kvs_die("the engine passed over the attention output of layer %ld", missing);
    if (s->resident)
        kvs_resident_end(g, s->plan, sched);
    return status;
}

void kvs_graph_laid_out(void *sched)
{
    pthread_mutex_lock(&lock);
    for (struct sched_state *s = states; s; s = s->link)
        if (s->sched == sched)
            s->laid_out = s->says_so = true;
    pthread_mutex_unlock(&lock);
}

bool kvs_graph_reserve(struct kvs_ggml *g, void *sched, struct ggml_cgraph *graph)
{
    if (kvs_session_resident() && !kvs_resident_reserve(g, graph))
        return false;
    return g->sched_reserve(sched, graph);
}

void kvs_host_callback(struct kvs_ggml *g, void *sched, kvs_eval_callback cb, void *user)
{
    struct sched_state *s = state_of(g, sched);
    s->host = cb;
    s->host_user = user;
}
