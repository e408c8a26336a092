/*
 * States that an engine saves in mode resident: encrypted and authenticated by the enclave, which alone can open them.
 *
 * A sealed state is the enclave's header and its records. The text records together are: magic, version, number of tokens, number of
 * layers, the length of the engine's own state (its keys and values are zeros), the cells of each layer, the tokens, and
 * that state with its zeros left out. Then the records with keys and values, layer by layer. docs/protocol.md, section 6.
 */
#include "sealed.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

void kvs_bytes_append(struct kvs_bytes *b, const void *data, size_t n)
{
    if (b->n + n > b->capacity) {
        b->capacity = 2 * (b->n + n) + 4096;
        b->p = realloc(b->p, b->capacity);
        if (!b->p)
            kvs_die("out of memory");
    }
    if (n > 0)
        memcpy(b->p + b->n, data, n);
    b->n += n;
}

void kvs_bytes_discard(struct kvs_bytes *b)
{
    if (b->p)
        explicit_bzero(b->p, b->n);
    free(b->p);
    *b = (struct kvs_bytes){0};
}

/* --- zeros left out: runs of [zeros, 8 bytes][length, 8 bytes][bytes] --- */

#define WORTH 64 /* zeros in a row that are left out */

static size_t zeros_at(const uint8_t *p, size_t n)
{
    size_t i = 0;
    static const uint8_t none[4096];
    while (n - i >= sizeof none && memcmp(p + i, none, sizeof none) == 0)
        i += sizeof none;
    while (i < n && p[i] == 0)
        i++;
    return i;
}

static void pack(struct kvs_bytes *out, const uint8_t *p, size_t n)
{
    for (size_t at = 0; at < n;) {
        uint64_t run[2] = {zeros_at(p + at, n - at), 0};
        at += run[0];
        size_t end = at;
        while (end < n) {
            size_t z = p[end] ? 0 : zeros_at(p + end, n - end < WORTH ? n - end : WORTH);
            if (z >= WORTH)
                break;
            end += z ? z : 1;
        }
        run[1] = end - at;
        kvs_bytes_append(out, run, sizeof run);
        kvs_bytes_append(out, p + at, run[1]);
        at = end;
    }
}

/* --- sealing --- */

/* The text of a state: everything but keys and values. */
static bool describe(const struct kvs_state *s, const int32_t *tokens, size_t count, struct kvs_record *r, struct kvs_bytes *text)
{
    kvs_own_calls(1);
    size_t size = s->size(s), n = 0;
    uint8_t *state = size > 0 ? calloc(1, size) : NULL;
    kvs_record_begin(r);
    if (state)
        n = s->get(s, state, size);
    kvs_record_end();
    kvs_own_calls(-1);
    if (!state)
        return false;
    struct kvs_prefix h = {KVS_STATE_MAGIC, KVS_STATE_VERSION, (uint32_t)count, (uint32_t)r->count, n};
    kvs_bytes_append(text, &h, sizeof h);
    for (size_t i = 0; i < r->count; i++) {
        uint64_t cells = r->layers[i].count;
        kvs_bytes_append(text, &cells, sizeof cells);
    }
    kvs_bytes_append(text, tokens, count * sizeof *tokens);
    pack(text, state, n);
    explicit_bzero(state, size);
    free(state);
    return n > 0;
}

bool kvs_seal_request(struct kvs_call *call, uint8_t *body, uint32_t op, const void *data, size_t n, struct kvs_bytes *out)
{
    uint32_t head[2] = {op, 0};
    memcpy(body, head, sizeof head);
    if (n > 0)
        memcpy(body + sizeof head, data, n);
    call->payload = (uint32_t)(sizeof head + n);
    const uint8_t *answer = kvs_channel_try(call);
    if (answer)
        kvs_bytes_append(out, answer, call->answer);
    return answer != NULL;
}

size_t kvs_seal_cells(const struct kvs_call *call, const struct kvs_cache *c)
{
    size_t cell = (size_t)c->kv_heads * (c->dim_k + c->dim_v) * 4 + 1024, rest = 4096 + KVS_SEAL_OVERHEAD;
    return call->capacity > rest ? (call->capacity - rest) / cell : 0;
}

static bool seal_layer(struct kvs_call *call, uint8_t *body, const struct kvs_recorded *l, struct kvs_bytes *out)
{
    const struct kvs_cache *c = l->cache;
    size_t most = kvs_seal_cells(call, c);
    if (most == 0) {
        snprintf(call->refusal, sizeof call->refusal, "the data plane is too small for it; use a larger --data-plane-bytes");
        return false;
    }
    call->id = c->id;
    call->layer = c->layer;
    for (size_t i = 0, n; i < l->count; i += n) {
        n = l->count - i < most ? l->count - i : most;
        if (!kvs_seal_request(call, body, SEAL_CELLS, l->cells + i, n * sizeof *l->cells, out))
            return false;
    }
    return true;
}

static bool seal_text(struct kvs_call *call, uint8_t *body, const struct kvs_bytes *text, struct kvs_bytes *out)
{
    size_t most = call->capacity - 8 - KVS_SEAL_OVERHEAD;
    for (size_t i = 0, n; i < text->n; i += n) {
        n = text->n - i < most ? text->n - i : most;
        if (!kvs_seal_request(call, body, SEAL_TEXT, text->p + i, n, out))
            return false;
    }
    return true;
}

static bool seal(const struct kvs_state *s, const int32_t *tokens, size_t count, struct kvs_bytes *out)
{
    struct kvs_record r = {0};
    struct kvs_bytes text = {0};
    bool ok = describe(s, tokens, count, &r, &text);
    if (ok) {
        struct kvs_call call = {.type = KVS_SEAL};
        uint8_t *body = kvs_channel_begin(&call);
        ok = kvs_seal_request(&call, body, SEAL_BEGIN, NULL, 0, out) && seal_text(&call, body, &text, out);
        for (size_t i = 0; ok && i < r.count; i++)
            ok = seal_layer(&call, body, &r.layers[i], out);
        ok = ok && kvs_seal_request(&call, body, SEAL_END, NULL, 0, out);
        if (!ok)
            kvs_say("the state of the cache cannot be sealed: %s", call.refusal);
        kvs_channel_end(&call);
    }
    kvs_record_free(&r);
    kvs_bytes_discard(&text);
    if (!ok)
        kvs_bytes_discard(out);
    return ok;
}

/* --- the engine's functions --- */

/* A state is sealed when its size is asked for, and kept for the call that fetches it. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    struct kvs_state of;
    struct kvs_bytes sealed;
    uint64_t changes;
} kept;

#define PARTIAL_ONLY 1u

static bool is_known(const struct kvs_state *s)
{
    if ((s->flags & ~PARTIAL_ONLY) == 0)
        return true;
    kvs_say("a state was asked for in a way that mode resident does not know (flags %u): refused", s->flags);
    return false;
}

size_t kvs_sealed_size(const struct kvs_state *s)
{
    if (!is_known(s))
        return 0;
    pthread_mutex_lock(&lock);
    kvs_bytes_discard(&kept.sealed);
    kept.of = *s;
    kept.changes = kvs_cells_changes();
    seal(s, NULL, 0, &kept.sealed);
    size_t n = kept.sealed.n;
    pthread_mutex_unlock(&lock);
    return n;
}

size_t kvs_sealed_get(const struct kvs_state *s, uint8_t *dst, size_t size)
{
    if (!is_known(s))
        return 0;
    pthread_mutex_lock(&lock);
    if (kept.sealed.n == 0 || kept.changes != kvs_cells_changes() || kept.of.context != s->context || kept.of.sequence != s->sequence || kept.of.flags != s->flags) {
        kvs_bytes_discard(&kept.sealed);
        seal(s, NULL, 0, &kept.sealed);
    }
    size_t n = kept.sealed.n;
    if (n <= size)
        memcpy(dst, kept.sealed.p, n);
    else
        n = 0;
    kvs_bytes_discard(&kept.sealed);
    pthread_mutex_unlock(&lock);
    return n;
}

size_t kvs_sealed_set(const struct kvs_state *s, const uint8_t *src, size_t size)
{
    return is_known(s) && kvs_unseal(s, src, size, NULL) ? size : 0;
}

static bool write_all(int fd, const struct kvs_bytes *b)
{
    for (size_t at = 0; at < b->n;) {
        ssize_t n = write(fd, b->p + at, b->n - at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        at += (size_t)n;
    }
    return true;
}

size_t kvs_sealed_save(const struct kvs_state *s, const char *path, const int32_t *tokens, size_t count)
{
    struct kvs_bytes b = {0};
    char temporary[4096 + 16];
    if ((size_t)snprintf(temporary, sizeof temporary, "%s.new", path) >= sizeof temporary || !seal(s, tokens, count, &b))
        return 0;
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    bool ok = fd >= 0 && write_all(fd, &b);
    ok = (fd < 0 || close(fd) == 0) && ok && rename(temporary, path) == 0;
    if (!ok) {
        kvs_say("%s: the sealed state cannot be written: %s", path, strerror(errno));
        unlink(temporary);
    }
    size_t n = ok ? b.n : 0;
    kvs_bytes_discard(&b);
    return n;
}

size_t kvs_sealed_load(const struct kvs_state *s, const char *path, int32_t *tokens, size_t capacity, size_t *count)
{
    struct stat st;
    struct kvs_bytes b = {0};
    const struct kvs_tokens_out out = {tokens, capacity, count};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool ok = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (size_t)st.st_size < KVS_STATE_MAX;
    if (ok) {
        b.capacity = (size_t)st.st_size + 1;
        b.p = malloc(b.capacity);
        ssize_t n = 1;
        while (b.p && b.n < (size_t)st.st_size && n > 0)
            if ((n = read(fd, b.p + b.n, (size_t)st.st_size - b.n)) > 0)
                b.n += (size_t)n;
        ok = b.p && b.n == (size_t)st.st_size;
    }
    if (!ok)
        kvs_say("%s: the saved state cannot be read: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    ok = ok && kvs_unseal(s, b.p, b.n, &out);
    size_t n = ok ? b.n : 0;
    free(b.p);
    return n;
}
