/*
 * Counts what the enclave costs, into memory that the supervisor reads: totals, a histogram, each layer, and a ring with a
 * record for each graph. Nobody is woken for it. docs/protocol.md, "Meter", has the layout.
 */
#include "meter.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define METER_MAGIC 0x4d4d564bu /* "KVMM" */
#define METER_VERSION 1
#define BUCKETS 160 /* 8 per power of two of nanoseconds, from 1024 ns up */
#define LAYERS 1024
#define RECORDS (1u << 14)
#define PARTS 7

enum { GRAPH = 1, SEQUENCES = 2, TRANSITION = 3 };

struct record {
    uint16_t kind, count;
    uint32_t number; /* of tokens, or of the layer */
    union {
        struct {
            uint64_t start, end;
            uint32_t transitions, sequences;
            uint64_t wait, enclave, bytes, graph;
        };
        struct kvs_part parts[PARTS];
        struct {
            uint64_t began, took, worked, payload, of_graph;
        };
    };
};
_Static_assert(sizeof(struct record) == 64, "a record is 64 bytes");

struct meter {
    uint32_t magic, version, records, layer_count;
    _Alignas(64) _Atomic uint64_t transitions;
    _Atomic uint64_t wait, bytes, enclave;
    _Alignas(64) _Atomic uint64_t written;
    _Alignas(64) _Atomic uint32_t detail;
    _Alignas(64) _Atomic uint64_t histogram[BUCKETS];
    _Alignas(4096) struct {
        _Atomic uint64_t transitions, wait, enclave, bytes;
    } layers[LAYERS];
    struct record ring[RECORDS];
};
_Static_assert(offsetof(struct meter, transitions) == 64 && offsetof(struct meter, written) == 128 &&
                   offsetof(struct meter, detail) == 192 && offsetof(struct meter, histogram) == 256 &&
                   offsetof(struct meter, layers) == 4096 && offsetof(struct meter, ring) == 4096 + 32 * LAYERS,
               "the meter is laid out as docs/protocol.md says");

static _Atomic(struct meter *) meter;
static pthread_mutex_t ring = PTHREAD_MUTEX_INITIALIZER; /* contexts compute at the same time */
static _Atomic uint64_t graphs;

static _Thread_local struct {
    uint64_t number; /* 0 outside a graph */
    int64_t start;
    uint32_t transitions;
    uint64_t wait, enclave, bytes;
} current;

int64_t kvs_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void kvs_meter_attach(int fd)
{
    struct stat st;
    if (fd < 0 || fstat(fd, &st) != 0 || st.st_size != (off_t)sizeof(struct meter))
        kvs_die("the meter's memory has the wrong size; use a kvshield command and libkvshield.so of the same version");
    void *m = mmap(NULL, sizeof(struct meter), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (m == MAP_FAILED)
        kvs_die("cannot map the meter");
    struct meter *found = m;
    if (found->magic != METER_MAGIC || found->version != METER_VERSION)
        kvs_die("the meter's memory is of another version; use a kvshield command and libkvshield.so of the same version");
    atomic_store(&meter, found);
}

static size_t bucket(int64_t ns)
{
    if (ns < 1024)
        return 0;
    unsigned power = 63 - (unsigned)__builtin_clzll((unsigned long long)ns);
    size_t index = (power - 10) * 8 + ((size_t)(ns >> (power - 3)) & 7);
    return index < BUCKETS ? index : BUCKETS - 1;
}

static void add(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static void write_records(struct meter *m, const struct record *list, size_t count)
{
    pthread_mutex_lock(&ring);
    uint64_t at = atomic_load_explicit(&m->written, memory_order_relaxed);
    for (size_t i = 0; i < count; i++)
        m->ring[(at + i) % RECORDS] = list[i];
    atomic_store_explicit(&m->written, at + count, memory_order_release);
    pthread_mutex_unlock(&ring);
}

void kvs_meter_transition(uint32_t layer, int64_t start, int64_t ns, uint64_t enclave_ns, size_t bytes)
{
    struct meter *m = atomic_load_explicit(&meter, memory_order_acquire);
    if (!m)
        return;
    add(&m->transitions, 1);
    add(&m->wait, (uint64_t)ns);
    add(&m->enclave, enclave_ns);
    add(&m->bytes, bytes);
    add(&m->histogram[bucket(ns)], 1);
    if (layer < LAYERS) {
        add(&m->layers[layer].transitions, 1);
        add(&m->layers[layer].wait, (uint64_t)ns);
        add(&m->layers[layer].enclave, enclave_ns);
        add(&m->layers[layer].bytes, bytes);
    }
    if (current.number == 0)
        return;
    current.transitions++;
    current.wait += (uint64_t)ns;
    current.enclave += enclave_ns;
    current.bytes += bytes;
    if (atomic_load_explicit(&m->detail, memory_order_relaxed)) {
        struct record r = {.kind = TRANSITION, .number = layer};
        r.began = (uint64_t)start;
        r.took = (uint64_t)ns;
        r.worked = enclave_ns;
        r.payload = bytes;
        r.of_graph = current.number;
        write_records(m, &r, 1);
    }
}

void kvs_meter_begin(int64_t now)
{
    memset(&current, 0, sizeof current);
    if (atomic_load_explicit(&meter, memory_order_acquire))
        current.number = atomic_fetch_add(&graphs, 1) + 1;
    current.start = now;
}

void kvs_meter_end(int64_t now, uint32_t tokens, const struct kvs_part *parts, size_t count)
{
    struct meter *m = atomic_load_explicit(&meter, memory_order_acquire);
    if (!m || current.number == 0)
        return;
    struct record list[KVS_PARTS_MAX / PARTS + 2];
    size_t n = 0;
    for (size_t i = 0; i < count; i += PARTS) {
        size_t some = count - i < PARTS ? count - i : PARTS;
        list[n] = (struct record){.kind = SEQUENCES, .count = (uint16_t)some};
        memcpy(list[n++].parts, parts + i, some * sizeof *parts);
    }
    struct record *r = &list[n++];
    *r = (struct record){.kind = GRAPH, .number = tokens};
    r->start = (uint64_t)current.start;
    r->end = (uint64_t)now;
    r->transitions = current.transitions;
    r->sequences = (uint32_t)count;
    r->wait = current.wait;
    r->enclave = current.enclave;
    r->bytes = current.bytes;
    r->graph = current.number;
    write_records(m, list, n);
    current.number = 0;
}
