/*
 * Threads of ggml's CPU backend. Ollama gives it none, so it starts some for each piece of a graph that is computed and ends them
 * again. A stock runner computes a graph in one piece; a shielded one stops at every layer, and starting threads at every layer
 * halves its speed. They are kept here instead.
 */
#include "engine.h"

#include <ggml-cpu.h>
#include <pthread.h>

extern enum ggml_status __real_ggml_graph_compute(struct ggml_cgraph *graph, struct ggml_cplan *plan);
enum ggml_status __wrap_ggml_graph_compute(struct ggml_cgraph *graph, struct ggml_cplan *plan);

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER; /* a pool computes one graph at a time; others get threads as ever */
static struct ggml_threadpool *pool;
static int threads;

static struct ggml_threadpool *pool_of(int n)
{
    if (n > threads) {
        struct ggml_threadpool_params params = ggml_threadpool_params_default(n);
        if (pool)
            ggml_threadpool_free(pool);
        pool = ggml_threadpool_new(&params);
        threads = pool ? n : 0;
    }
    return pool;
}

enum ggml_status __wrap_ggml_graph_compute(struct ggml_cgraph *graph, struct ggml_cplan *plan)
{
    if (!kvs_link_shields() || plan->threadpool || plan->n_threads < 2 || pthread_mutex_trylock(&turn) != 0)
        return __real_ggml_graph_compute(graph, plan);
    plan->threadpool = pool_of(plan->n_threads);
    enum ggml_status status = __real_ggml_graph_compute(graph, plan);
    plan->threadpool = NULL;
    pthread_mutex_unlock(&turn);
    return status;
}
