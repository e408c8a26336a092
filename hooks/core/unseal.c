/* Opening a sealed state: the enclave checks all of it before the engine sees any of it. */
#include "sealed.h"

#include <stdlib.h>

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

struct sealed {
    const uint8_t *p;
    size_t n;
    size_t *records; /* where each begins */
    size_t count;
};

static bool split(struct sealed *f)
{
    for (size_t at = KVS_SEAL_HEADER; at < f->n;) {
        uint32_t len;
        if (f->n - at < KVS_SEAL_OVERHEAD)
            return false;
        memcpy(&len, f->p + at + 4, sizeof len);
        if (len > f->n - at - KVS_SEAL_OVERHEAD)
            return false;
        if (f->count % 64 == 0)
            f->records = realloc(f->records, (f->count + 65) * sizeof *f->records);
        if (!f->records)
            kvs_die("out of memory");
        f->records[f->count++] = at;
        f->records[f->count] = at += KVS_SEAL_OVERHEAD + len;
    }
    return f->count > 0;
}

/* Has the enclave check every record; collects the text. */
static bool check(const struct sealed *f, struct kvs_call *call, uint8_t *body, struct kvs_bytes *text, size_t *first_cells)
{
    struct kvs_bytes none = {0};
    if (!kvs_seal_request(call, body, UNSEAL_BEGIN, f->p, KVS_SEAL_HEADER, &none))
        return false;
    *first_cells = 0;
    for (size_t i = 0; i < f->count; i++) {
        struct kvs_bytes answer = {0};
        uint32_t head[2];
        size_t len = f->records[i + 1] - f->records[i];
        if (len > call->capacity - 8) {
            snprintf(call->refusal, sizeof call->refusal, "it was saved with a larger --data-plane-bytes");
            return false;
        }
        if (!kvs_seal_request(call, body, UNSEAL_CHECK, f->p + f->records[i], len, &answer))
            return false;
        if (answer.n < sizeof head)
            kvs_die("the enclave's answer for a sealed state has %zu bytes", answer.n);
        memcpy(head, answer.p, sizeof head);
        if (head[1])
            kvs_bytes_append(text, answer.p + sizeof head, answer.n - sizeof head);
        if (head[1])
            *first_cells = i + 1;
        kvs_bytes_discard(&answer);
        if (head[0] != (i + 1 == f->count)) {
            snprintf(call->refusal, sizeof call->refusal, "it is not whole");
            return false;
        }
    }
    return true;
}

struct opened {
    struct kvs_prefix h;
    const uint8_t *cells; /* of each layer, 8 bytes */
    const uint8_t *tokens, *state;
    size_t state_len;
};

static bool parse(const struct kvs_bytes *text, struct opened *o)
{
    if (text->n < sizeof o->h)
        return false;
    memcpy(&o->h, text->p, sizeof o->h);
    size_t left = text->n - sizeof o->h;
    if (o->h.magic != KVS_STATE_MAGIC || o->h.version != KVS_STATE_VERSION || o->h.layers > left / 8 || o->h.state > KVS_STATE_MAX)
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
        size_t most = kvs_seal_cells(call, l->cache);
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

bool kvs_unseal(const struct kvs_state *s, const uint8_t *p, size_t n, const struct kvs_tokens_out *tokens)
{
    struct sealed f = {.p = p, .n = n};
    struct kvs_bytes text = {0};
    struct opened o;
    struct kvs_record r = {0};
    struct kvs_call call = {.type = KVS_UNSEAL};
    size_t record = 0;
    bool counted = false; /* the caller wants to know how many tokens there are, and nothing else */
    const char *why = "it is not a state that kvshield sealed";
    bool ok = n > KVS_SEAL_HEADER && memcmp(p, "KVSEALED", 8) == 0 && split(&f);
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
    kvs_bytes_discard(&text);
    free(f.records);
    return ok;
}
