/*
 * States that an engine saves in mode resident: encrypted and authenticated by the enclave, which alone can open them.
 *
 * A sealed state is the enclave's header and its records. The text records together are: magic, version, number of tokens, number of
 * layers, the length of the engine's own state (its keys and values are zeros), the cells of each layer, the tokens, and
 * that state with its zeros left out. Then the records with keys and values, layer by layer. docs/protocol.md, section 6.
 */
#include "record.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC 0x5453564bu /* "KVST" */
#define VERSION 1
#define HEADER 320
#define OVERHEAD 32
#define STATE_MAX ((size_t)1 << 40)

enum { SEAL_BEGIN = 0, SEAL_TEXT, SEAL_CELLS, SEAL_END };
enum { UNSEAL_BEGIN = 0, UNSEAL_CHECK, UNSEAL_PLACE };

struct bytes {
    uint8_t *p;
    size_t n, capacity;
};

static void append(struct bytes *b, const void *data, size_t n)
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

static void discard(struct bytes *b)
{
    if (b->p)
        explicit_bzero(b->p, b->n);
    free(b->p);
    *b = (struct bytes){0};
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

static void pack(struct bytes *out, const uint8_t *p, size_t n)
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
        append(out, run, sizeof run);
        append(out, p + at, run[1]);
        at = end;
    }
}

static bool unpack(const uint8_t *p, size_t n, uint8_t *out, size_t room)
{
    while (n > 0) {
        uint64_t run[2];
        if (n < sizeof run)
            return false;
        memcpy(run, p, sizeof run);
        p += sizeof run;
        n -= sizeof run;
        if (run[0] > room || run[1] > room - run[0] || run[1] > n)
            return false;
        memcpy(out + run[0], p, run[1]);
        out += run[0] + run[1];
        room -= run[0] + run[1];
        p += run[1];
        n -= run[1];
    }
    return room == 0;
}

/* --- sealing --- */

struct prefix {
    uint32_t magic, version, tokens, layers;
    uint64_t state;
};

/* The text of a state: everything but keys and values. */
static bool describe(const struct kvs_state *s, const int32_t *tokens, size_t count, struct kvs_record *r, struct bytes *text)
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
    struct prefix h = {MAGIC, VERSION, (uint32_t)count, (uint32_t)r->count, n};
    append(text, &h, sizeof h);
    for (size_t i = 0; i < r->count; i++) {
        uint64_t cells = r->layers[i].count;
        append(text, &cells, sizeof cells);
    }
    append(text, tokens, count * sizeof *tokens);
    pack(text, state, n);
    explicit_bzero(state, size);
    free(state);
    return n > 0;
}

static bool request(struct kvs_call *call, uint8_t *body, uint32_t op, const void *data, size_t n, struct bytes *out)
{
    uint32_t head[2] = {op, 0};
    memcpy(body, head, sizeof head);
    if (n > 0)
        memcpy(body + sizeof head, data, n);
    call->payload = (uint32_t)(sizeof head + n);
    const uint8_t *answer = kvs_channel_try(call);
    if (answer)
        append(out, answer, call->answer);
    return answer != NULL;
}

static bool seal_layer(struct kvs_call *call, uint8_t *body, const struct kvs_recorded *l, struct bytes *out)
{
    const struct kvs_cache *c = l->cache;
    size_t cell = (size_t)c->kv_heads * (c->dim_k + c->dim_v) * 4 + 1024;
    size_t most = (call->capacity - 4096 - OVERHEAD) / cell;
    if (call->capacity < 8192 || most == 0) {
        snprintf(call->refusal, sizeof call->refusal, "the data plane is too small for it; use a larger --data-plane-bytes");
        return false;
    }
    call->id = c->id;
    call->layer = c->layer;
    for (size_t i = 0, n; i < l->count; i += n) {
        n = l->count - i < most ? l->count - i : most;
        if (!request(call, body, SEAL_CELLS, l->cells + i, n * sizeof *l->cells, out))
            return false;
    }
    return true;
}

static bool seal_text(struct kvs_call *call, uint8_t *body, const struct bytes *text, struct bytes *out)
{
    size_t most = call->capacity - 8 - OVERHEAD;
    for (size_t i = 0, n; i < text->n; i += n) {
        n = text->n - i < most ? text->n - i : most;
        if (!request(call, body, SEAL_TEXT, text->p + i, n, out))
            return false;
    }
    return true;
}

static bool seal(const struct kvs_state *s, const int32_t *tokens, size_t count, struct bytes *out)
{
    struct kvs_record r = {0};
    struct bytes text = {0};
    bool ok = describe(s, tokens, count, &r, &text);
    if (ok) {
        struct kvs_call call = {.type = KVS_SEAL};
        uint8_t *body = kvs_channel_begin(&call);
        ok = request(&call, body, SEAL_BEGIN, NULL, 0, out) && seal_text(&call, body, &text, out);
        for (size_t i = 0; ok && i < r.count; i++)
            ok = seal_layer(&call, body, &r.layers[i], out);
        ok = ok && request(&call, body, SEAL_END, NULL, 0, out);
        if (!ok)
            kvs_say("the state of the cache cannot be sealed: %s", call.refusal);
        kvs_channel_end(&call);
    }
    kvs_record_free(&r);
    discard(&text);
    if (!ok)
        discard(out);
    return ok;
}

/* --- opening --- */

struct sealed {
    const uint8_t *p;
    size_t n;
    size_t *records; /* where each begins */
    size_t count;
};

static bool split(struct sealed *f)
{
    for (size_t at = HEADER; at < f->n;) {
        uint32_t len;
        if (f->n - at < OVERHEAD)
            return false;
        memcpy(&len, f->p + at + 4, sizeof len);
        if (len > f->n - at - OVERHEAD)
            return false;
        if (f->count % 64 == 0)
            f->records = realloc(f->records, (f->count + 65) * sizeof *f->records);
        if (!f->records)
            kvs_die("out of memory");
        f->records[f->count++] = at;
        f->records[f->count] = at += OVERHEAD + len;
    }
    return f->count > 0;
}

/* Has the enclave check every record; collects the text. */
static bool check(const struct sealed *f, struct kvs_call *call, uint8_t *body, struct bytes *text, size_t *first_cells)
{
    struct bytes none = {0};
    if (!request(call, body, UNSEAL_BEGIN, f->p, HEADER, &none))
        return false;
    *first_cells = 0;
    for (size_t i = 0; i < f->count; i++) {
        struct bytes answer = {0};
        uint32_t head[2];
        size_t len = f->records[i + 1] - f->records[i];
        if (len > call->capacity - 8) {
            snprintf(call->refusal, sizeof call->refusal, "it was saved with a larger --data-plane-bytes");
            return false;
        }
        if (!request(call, body, UNSEAL_CHECK, f->p + f->records[i], len, &answer))
            return false;
        if (answer.n < sizeof head)
            kvs_die("the enclave's answer for a sealed state has %zu bytes", answer.n);
        memcpy(head, answer.p, sizeof head);
        if (head[1])
            append(text, answer.p + sizeof head, answer.n - sizeof head);
        if (head[1])
            *first_cells = i + 1;
        discard(&answer);
        if (head[0] != (i + 1 == f->count)) {
            snprintf(call->refusal, sizeof call->refusal, "it is not whole");
            return false;
        }
    }
    return true;
}

struct opened {
    struct prefix h;
    const uint8_t *cells; /* of each layer, 8 bytes */
    const uint8_t *tokens, *state;
    size_t state_len;
};

static bool parse(const struct bytes *text, struct opened *o)
{
    if (text->n < sizeof o->h)
        return false;
    memcpy(&o->h, text->p, sizeof o->h);
    size_t left = text->n - sizeof o->h;
    if (o->h.magic != MAGIC || o->h.version != VERSION || o->h.layers > left / 8 || o->h.state > STATE_MAX)
        return false;
    o->cells = text->p + sizeof o->h;
    left -= 8 * (size_t)o->h.layers;
    if (o->h.tokens > left / 4)
        return false;
    o->tokens = o->cells + 8 * (size_t)o->h.layers;
    o->state = o->tokens + 4 * (size_t)o->h.tokens;
    o->state_len = left - 4 * (size_t)o->h.tokens;
    return true;
}

/* Lets the engine take its own part of the state; notes which cells it gives to it. */
static bool restore(const struct kvs_state *s, const struct opened *o, struct kvs_record *r)
{
    uint8_t *state = calloc(1, o->h.state + 1);
    bool ok = state && unpack(o->state, o->state_len, state, o->h.state);
    if (ok) {
        kvs_own_calls(1);
        kvs_record_begin(r);
        ok = s->set(s, state, o->h.state) == o->h.state;
        kvs_record_end();
        kvs_own_calls(-1);
    }
    if (state)
        explicit_bzero(state, o->h.state);
    free(state);
    return ok;
}

/* From here on there is no way back: the engine believes that the cells are filled. */
static void place(const struct sealed *f, struct kvs_call *call, uint8_t *body, const struct opened *o, struct kvs_record *r, size_t record)
{
    if (r->count != o->h.layers)
        kvs_die("the engine restored %zu layers of %u", r->count, o->h.layers);
    for (size_t i = 0; i < r->count; i++) {
        const struct kvs_recorded *l = &r->layers[i];
        uint64_t want;
        memcpy(&want, o->cells + 8 * i, sizeof want);
        if (l->count != want)
            kvs_die("the engine restored %zu cells of %llu", l->count, (unsigned long long)want);
        size_t cell = (size_t)l->cache->kv_heads * (l->cache->dim_k + l->cache->dim_v) * 4 + 1024;
        size_t most = (call->capacity - 4096 - OVERHEAD) / cell; /* as seal_layer cuts */
        call->id = l->cache->id;
        call->layer = l->cache->layer;
        for (size_t at = 0, n; at < l->count; at += n, record++) {
            n = l->count - at < most ? l->count - at : most;
            size_t len = record < f->count ? f->records[record + 1] - f->records[record] : 0;
            uint32_t head[4] = {UNSEAL_PLACE, 0, (uint32_t)record, (uint32_t)n};
            if (len == 0 || sizeof head + 8 * n + len > call->capacity)
                kvs_die("a sealed state was saved with another --data-plane-bytes");
            memcpy(body, head, sizeof head);
            memcpy(body + sizeof head, l->cells + at, 8 * n);
            memcpy(body + sizeof head + 8 * n, f->p + f->records[record], len);
            call->payload = (uint32_t)(sizeof head + 8 * n + len);
            kvs_channel_call(call);
        }
    }
}

struct tokens_out {
    int32_t *at;
    size_t capacity, *count;
};

static bool unseal(const struct kvs_state *s, const uint8_t *p, size_t n, const struct tokens_out *tokens)
{
    struct sealed f = {.p = p, .n = n};
    struct bytes text = {0};
    struct opened o;
    struct kvs_record r = {0};
    struct kvs_call call = {.type = KVS_UNSEAL};
    size_t record = 0;
    bool counted = false; /* the caller wants to know how many tokens there are, and nothing else */
    const char *why = "it is not a state that kvshield sealed";
    bool ok = n > HEADER && memcmp(p, "KVSEALED", 8) == 0 && split(&f);
    if (ok) {
        uint8_t *body = kvs_channel_begin(&call);
        ok = check(&f, &call, body, &text, &record) && parse(&text, &o);
        why = call.refusal[0] ? call.refusal : "it is of another version";
        counted = ok && tokens && !tokens->at;
        if (ok && tokens && !counted && o.h.tokens > tokens->capacity) {
            ok = false;
            why = "it has more tokens than this context";
        }
        kvs_channel_end(&call);
    }
    if (counted) {
        *tokens->count = o.h.tokens;
    } else if (ok) { /* the engine calls back into the hook, so the data plane must be free */
        ok = restore(s, &o, &r);
        why = "the engine does not take it: another context, or no room in its cache";
    }
    if (ok && !counted) {
        uint8_t *body = kvs_channel_begin(&call);
        place(&f, &call, body, &o, &r, record);
        kvs_channel_end(&call);
    }
    if (ok && !counted && tokens) {
        memcpy(tokens->at, o.tokens, 4 * (size_t)o.h.tokens);
        *tokens->count = o.h.tokens;
    }
    if (!ok)
        kvs_say("a saved state was refused: %s", why);
    kvs_record_free(&r);
    discard(&text);
    free(f.records);
    return ok;
}

/* --- the engine's functions --- */

/* A state is sealed when its size is asked for, and kept for the call that fetches it. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    struct kvs_state of;
    struct bytes sealed;
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
    discard(&kept.sealed);
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
        discard(&kept.sealed);
        seal(s, NULL, 0, &kept.sealed);
    }
    size_t n = kept.sealed.n;
    if (n <= size)
        memcpy(dst, kept.sealed.p, n);
    else
        n = 0;
    discard(&kept.sealed);
    pthread_mutex_unlock(&lock);
    return n;
}

size_t kvs_sealed_set(const struct kvs_state *s, const uint8_t *src, size_t size)
{
    return is_known(s) && unseal(s, src, size, NULL) ? size : 0;
}

static bool write_all(int fd, const struct bytes *b)
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
    struct bytes b = {0};
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
    discard(&b);
    return n;
}

size_t kvs_sealed_load(const struct kvs_state *s, const char *path, int32_t *tokens, size_t capacity, size_t *count)
{
    struct stat st;
    struct bytes b = {0};
    const struct tokens_out out = {tokens, capacity, count};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool ok = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (size_t)st.st_size < STATE_MAX;
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
    ok = ok && unseal(s, b.p, b.n, &out);
    size_t n = ok ? b.n : 0;
    free(b.p);
    return n;
}
