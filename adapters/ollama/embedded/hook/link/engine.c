/*
 * Ollama's own engine (kvcache/causal.go) gives its tensors no names. A cache is what it writes with SET_ROWS, for each layer
 * first the keys, then the values. Whether what was taken for keys is compared with queries, and values with what comes
 * of it, is checked by hooks/core/scan.c in mode resident.
 */
#include "engine.h"

static bool is_op(struct kvs_ggml *g, const struct ggml_tensor *t, const char *op)
{
    return strcmp(g->op_desc(t), op) == 0;
}

/* Memory that outlives the graph: not the result of one of its nodes. */
static bool is_leaf(struct kvs_ggml *g, const struct ggml_tensor *t)
{
    return *kvs_op_of(g, t) == 0;
}

void kvs_link_name_caches(struct kvs_ggml *g, struct ggml_cgraph *graph)
{
    size_t writes = 0;
    for (int i = 0, n = g->graph_n_nodes(graph); i < n; i++) {
        struct ggml_tensor *node = g->graph_node(graph, i);
        struct ggml_tensor *base = kvs_view_src(g, node);
        if (!base || !is_leaf(g, base))
            continue;
        if (is_op(g, node, "SET_ROWS")) {
            char name[32];
            snprintf(name, sizeof name, "cache_%c_l%zu", writes % 2 ? 'v' : 'k', writes / 2);
            if (!kvs_is_cache(kvs_name(g, base)))
                g->set_name(base, name);
            writes++;
        } else if (!kvs_session_observes() && is_op(g, node, "CPY") && !kvs_is_cache(kvs_name(g, base))) {
            kvs_die("this model keeps another state than keys and values, which would hold the conversation in clear; use another model");
        }
    }
}
