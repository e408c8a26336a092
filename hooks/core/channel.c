/*
 * The data plane: one frame out, one frame back, over shared memory with futexes or over a socket.
 * One frame is in flight at a time; threads of the engine take turns.
 */
#include "meter.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define FRAME_MAGIC 0x4653564bu /* "KVSF" */
#define FRAME_VERSION 3
#define SHM_MAGIC 0x4d53564bu /* "KVSM" */
#define PAGE 4096

enum { TRANSPORT_SHM = 1, TRANSPORT_SOCKET = 2 };
enum { FRAME_INVERT = 1, FRAME_REPLY = 2, FRAME_ERROR = 3, FRAME_ANSWER = 14 };
#define ERROR_TEXT_MAX 512

struct frame_header {
    uint32_t magic;
    uint16_t version, type;
    uint32_t model, layer, rows, row_bytes;
    uint64_t sequence;
    uint32_t payload, status;
    uint64_t enclave_ns; /* of an answer: what it took to make */
    uint8_t reserved[16];
};
_Static_assert(sizeof(struct frame_header) == 64, "the frame header is 64 bytes on the wire");

/* The first page of the shared memory: docs/protocol.md, "Shared memory". */
struct control {
    uint32_t magic, version, capacity, reserved;
    _Alignas(64) _Atomic uint32_t request;        /* futex: counts requests */
    _Atomic uint32_t enclave_sleeps;
    _Alignas(64) _Atomic uint32_t reply;          /* futex: counts replies */
    _Atomic uint32_t engine_sleeps;
};
_Static_assert(offsetof(struct control, request) == 64 && offsetof(struct control, reply) == 128,
               "the control block is laid out as docs/protocol.md says");
_Static_assert(sizeof(struct control) <= PAGE, "the control block is one page");

static struct {
    pthread_mutex_t turn;
    uint32_t transport, capacity, timeout_ms;
    int64_t spin_ns;
    uint64_t sequence;
    int fd; /* socket transport */
    struct control *control;
    struct frame_header *request, *reply;
    uint8_t *request_rows, *reply_rows;
} channel = {.turn = PTHREAD_MUTEX_INITIALIZER, .fd = -1};

static void attach_shm(int fd)
{
    size_t region = PAGE + channel.capacity;
    size_t size = PAGE + 2 * region;
    struct stat st;
    if (channel.capacity % PAGE != 0 || fstat(fd, &st) != 0 || st.st_size != (off_t)size)
        kvs_die("the data plane's shared memory has the wrong size");
    uint8_t *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        kvs_die("cannot map the data plane: %s", strerror(errno));
    close(fd);
    madvise(base, size, MADV_DONTDUMP);
    channel.control = (struct control *)(void *)base;
    if (channel.control->magic != SHM_MAGIC || channel.control->version != FRAME_VERSION ||
        channel.control->capacity != channel.capacity)
        kvs_die("the data plane's shared memory is of another version");
    channel.request = (struct frame_header *)(void *)(base + PAGE);
    channel.request_rows = base + PAGE + sizeof *channel.request;
    channel.reply = (struct frame_header *)(void *)(base + PAGE + region);
    channel.reply_rows = base + PAGE + region + sizeof *channel.reply;
}

static void attach_socket(int fd)
{
    struct timeval t = {channel.timeout_ms / 1000, (channel.timeout_ms % 1000) * 1000};
    /* The mode comes along with the descriptor; a socket that does not block knows no timeout. */
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
    channel.fd = fd;
    uint8_t *both = malloc(2 * (sizeof(struct frame_header) + channel.capacity));
    if (!both)
        kvs_die("out of memory");
    channel.request = (struct frame_header *)(void *)both;
    channel.request_rows = both + sizeof *channel.request;
    channel.reply = (struct frame_header *)(void *)(both + sizeof *channel.request + channel.capacity);
    channel.reply_rows = (uint8_t *)channel.reply + sizeof *channel.reply;
}

void kvs_channel_attach(const struct kvs_welcome *w)
{
    channel.transport = w->transport;
    channel.capacity = w->capacity;
    channel.timeout_ms = w->timeout_ms;
    channel.spin_ns = (int64_t)w->spin_us * 1000;
    if (w->capacity == 0 || w->capacity > (1u << 30))
        kvs_die("the data plane has an impossible capacity of %u bytes", w->capacity);
    if (w->transport == TRANSPORT_SHM)
        attach_shm(w->fd);
    else if (w->transport == TRANSPORT_SOCKET)
        attach_socket(w->fd);
    else
        kvs_die("the supervisor asked for data plane transport %u, which this hook does not know", w->transport);
}

uint32_t kvs_channel_rows(uint32_t row_bytes)
{
    uint32_t rows = row_bytes ? channel.capacity / row_bytes : 0;
    if (rows == 0)
        kvs_die("one row of the attention output (%u bytes) does not fit the data plane (%u bytes); "
                "start kvshield with a larger --data-plane-bytes",
                row_bytes, channel.capacity);
    return rows;
}

/* --- shared memory --- */

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Waits until the reply word is no longer `before`; false when the time is over. */
static bool wait_reply(uint32_t before, int64_t start)
{
    struct control *c = channel.control;
    for (int64_t end = start + channel.spin_ns; kvs_now_ns() < end; pause_cpu())
        if (atomic_load_explicit(&c->reply, memory_order_acquire) != before)
            return true;

    int64_t deadline = start + (int64_t)channel.timeout_ms * 1000000;
    atomic_store(&c->engine_sleeps, 1);
    while (atomic_load(&c->reply) == before) {
        int64_t left = deadline - kvs_now_ns();
        if (left <= 0)
            return false;
        struct timespec t = {left / 1000000000, left % 1000000000};
        syscall(SYS_futex, &c->reply, FUTEX_WAIT, before, &t, NULL, 0);
    }
    atomic_store(&c->engine_sleeps, 0);
    return true;
}

static bool exchange_shm(void)
{
    struct control *c = channel.control;
    uint32_t before = atomic_load(&c->reply);
    atomic_fetch_add(&c->request, 1);
    if (atomic_load(&c->enclave_sleeps))
        futex_wake(&c->request);
    return wait_reply(before, kvs_now_ns());
}

/* --- socket --- */

static bool send_all(const uint8_t *p, size_t len)
{
    while (len > 0) {
        ssize_t n = send(channel.fd, p, len, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        p += n;
        len -= (size_t)n;
    }
    return true;
}

static bool receive_all(uint8_t *p, size_t len)
{
    while (len > 0) {
        ssize_t n = recv(channel.fd, p, len, MSG_WAITALL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        p += n;
        len -= (size_t)n;
    }
    return true;
}

static bool exchange_socket(void)
{
    size_t header = sizeof *channel.request;
    if (!send_all((const uint8_t *)channel.request, header + channel.request->payload) ||
        !receive_all((uint8_t *)channel.reply, header))
        return false;
    if (channel.reply->payload > channel.capacity)
        return true; /* check_reply says what is wrong with it */
    return receive_all(channel.reply_rows, channel.reply->payload);
}

/* --- both --- */

static void check_reply(const struct frame_header *want, const struct frame_header *got)
{
    if (got->magic != FRAME_MAGIC || got->version != FRAME_VERSION)
        kvs_die("the enclave's answer is not a frame of version %d", FRAME_VERSION);
    if (got->sequence != want->sequence)
        kvs_die("the enclave answered with sequence number %llu instead of %llu", (unsigned long long)got->sequence,
                (unsigned long long)want->sequence);
    if (got->type == FRAME_ERROR)
        return;
    bool rows = want->type == FRAME_INVERT;
    if (got->type != (rows ? FRAME_REPLY : FRAME_ANSWER) || got->status != 0 || got->model != want->model ||
        got->layer != want->layer || got->rows != want->rows || got->row_bytes != want->row_bytes ||
        (rows ? got->payload != want->payload : got->payload > channel.capacity))
        kvs_die("the enclave's answer for layer %u does not fit the question", want->layer);
}

/* Sends the request whose payload lies in request_rows, and returns the answer's header, checked; it may be an error. */
static struct frame_header exchange(struct frame_header *want)
{
    want->magic = FRAME_MAGIC;
    want->version = FRAME_VERSION;
    want->sequence = ++channel.sequence;
    *channel.request = *want;
    if (!(channel.transport == TRANSPORT_SHM ? exchange_shm() : exchange_socket()))
        kvs_die("the enclave did not answer within %u ms; it is frozen, overloaded or gone", channel.timeout_ms);
    struct frame_header got = *channel.reply; /* checked and used from a copy: the peer may go on writing */
    check_reply(want, &got);
    return got;
}

static void error_text(const struct frame_header *got, char *text, size_t len)
{
    size_t n = got->payload <= ERROR_TEXT_MAX ? got->payload : 0;
    n = n < len ? n : len - 1;
    memcpy(text, channel.reply_rows, n);
    text[n] = 0;
    if (n == 0)
        snprintf(text, len, "error %u", got->status);
}

void kvs_channel_transition(const struct kvs_frame *f, kvs_rows_get get, kvs_rows_put put, void *user)
{
    pthread_mutex_lock(&channel.turn);
    int64_t start = kvs_now_ns();
    struct frame_header want = {.type = FRAME_INVERT,
                                .model = f->model,
                                .layer = f->layer,
                                .rows = f->rows,
                                .row_bytes = f->row_bytes,
                                .payload = f->rows * f->row_bytes};
    get(user, channel.request_rows, want.payload);
    struct frame_header got = exchange(&want);
    if (got.type == FRAME_ERROR)
        kvs_die("the enclave refused layer %u of model %u (error %u)", want.layer, want.model, got.status);
    put(user, channel.reply_rows, want.payload);
    kvs_meter_transition(want.layer, start, kvs_now_ns() - start, got.enclave_ns, want.payload);
    pthread_mutex_unlock(&channel.turn);
}

size_t kvs_channel_capacity(void)
{
    return channel.capacity;
}

uint8_t *kvs_channel_begin(struct kvs_call *call)
{
    pthread_mutex_lock(&channel.turn);
    call->start = kvs_now_ns();
    call->enclave_ns = call->sent = 0;
    call->capacity = channel.capacity;
    call->refusal[0] = 0;
    return channel.request_rows;
}

const uint8_t *kvs_channel_try(struct kvs_call *call)
{
    struct frame_header want = {.type = (uint16_t)call->type, .model = call->id, .layer = call->layer, .payload = call->payload};
    struct frame_header got = exchange(&want);
    if (got.type == FRAME_ERROR) {
        error_text(&got, call->refusal, sizeof call->refusal);
        return NULL;
    }
    call->answer = got.payload;
    call->enclave_ns += got.enclave_ns;
    call->sent += call->payload;
    return channel.reply_rows;
}

const uint8_t *kvs_channel_call(struct kvs_call *call)
{
    const uint8_t *answer = kvs_channel_try(call);
    if (!answer)
        kvs_die("the enclave refused layer %u (request %u): %s", call->layer, call->type, call->refusal);
    return answer;
}

void kvs_channel_end(const struct kvs_call *call)
{
    if (call->type == KVS_ATTEND || call->type == KVS_BATCH)
        kvs_meter_transition(call->type == KVS_ATTEND ? call->layer : KVS_NO_LAYER, call->start, kvs_now_ns() - call->start,
                             call->enclave_ns, call->sent);
    pthread_mutex_unlock(&channel.turn);
}
