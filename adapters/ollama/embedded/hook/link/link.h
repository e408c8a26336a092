/* The hook as it is linked into kvshield-ollama: what its main says to it. */
#ifndef KVS_LINK_H
#define KVS_LINK_H

#include <stddef.h>
#include <stdint.h>

enum kvs_link_engine {
    KVS_LINK_NONE,  /* no runner: this process computes nothing, and ends when it does */
    KVS_LINK_OFF,   /* mode off */
    KVS_LINK_LLAMA, /* llama.cpp's runner, which opens models by itself */
    KVS_LINK_OLLAMA /* Ollama's own engine, which gets a model from kvs_link_open */
};
void kvs_link_is(enum kvs_link_engine engine);
/* The path under which a runner is to open the model instead. False when it was refused; `out` is the reason then. */
int kvs_link_open(const char *path, char *out, size_t len);
/* In mode resident `look` is called before each graph of Ollama's own engine, on a thread of its own computation. */
void kvs_link_watch(void (*look)(void));
/* Wipes the cells of a cache, named by its tensor of keys, that have no bit. Not called but by `look`. */
void kvs_link_keep(const void *keys, const uint32_t *cells);

#endif
