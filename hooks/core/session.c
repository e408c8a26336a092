/*
 * The session socket: hello, one open per model, and the supervisor's word to stop. A thread of the hook
 * reads it all the time, so that an engine that is idle ends as well when the supervisor is gone.
 */
#include "meter.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define MAGIC 0x5353564bu /* "KVSS" */
#define VERSION 6
#define MESSAGE_MAX 8192

#define REFUSAL_MAX 512

enum { HELLO = 1, WELCOME, OPEN, OPENED, REFUSED, FATAL, STOP, DUMP, DUMPED, METER };
enum { MAY_DUMP = 1, OBSERVE = 2, RESIDENT = 4, SCRUB = 8 }; /* flags of WELCOME */
enum { FIXED_HEADS = 1 };                                      /* of OPENED */

struct header {
    uint32_t magic;
    uint16_t version, type;
    uint32_t length, reserved;
};

struct message {
    struct header h;
    uint8_t body[MESSAGE_MAX];
    int fd; /* -1 when none came along */
};

static struct {
    int fd;
    pid_t pid; /* of the process that said hello: a fork must say its own */
    pthread_mutex_t request; /* one request at a time */
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    bool have_reply;
    struct message reply;
    uint32_t flags;
    atomic_bool clear; /* its user allows this process to run in the clear */
    bool dump_wanted;
    struct kvs_dump_request dump;
} session = {.fd = -1,
             .request = PTHREAD_MUTEX_INITIALIZER,
             .lock = PTHREAD_MUTEX_INITIALIZER,
             .arrived = PTHREAD_COND_INITIALIZER};

static bool send_message(int fd, uint16_t type, const void *body, size_t len, int pass, int flags)
{
    struct header h = {MAGIC, VERSION, type, (uint32_t)len, 0};
    struct iovec parts[2] = {{&h, sizeof h}, {(void *)body, len}};
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct msghdr m = {.msg_iov = parts, .msg_iovlen = 2};
    if (pass >= 0) {
        m.msg_control = control.space;
        m.msg_controllen = sizeof control.space;
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &pass, sizeof pass);
    }
    ssize_t n;
    do
        n = sendmsg(fd, &m, MSG_NOSIGNAL | flags);
    while (n < 0 && errno == EINTR);
    return n == (ssize_t)(sizeof h + len);
}

/* One message, checked; false when the socket ended. Anything malformed is fatal. */
static bool receive_message(int fd, struct message *out)
{
    struct iovec parts[2] = {{&out->h, sizeof out->h}, {out->body, sizeof out->body}};
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct msghdr m = {
        .msg_iov = parts, .msg_iovlen = 2, .msg_control = control.space, .msg_controllen = sizeof control.space};
    ssize_t n;
    do
        n = recvmsg(fd, &m, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n <= 0)
        return false;
    out->fd = -1;
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(int)))
        memcpy(&out->fd, CMSG_DATA(c), sizeof out->fd);
    if ((m.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) || n < (ssize_t)sizeof out->h || out->h.magic != MAGIC ||
        out->h.version != VERSION || out->h.length != (size_t)n - sizeof out->h)
        kvs_die("the session socket sent a message that this hook does not understand; "
                "use a kvshield command and libkvshield.so of the same version");
    return true;
}

static uint32_t u32(const struct message *m, size_t index)
{
    uint32_t v;
    if ((index + 1) * sizeof v > m->h.length)
        kvs_die("the supervisor's message %u is too short", m->h.type);
    memcpy(&v, m->body + index * sizeof v, sizeof v);
    return v;
}

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

/* Keeps the request for the thread that computes the next graph. */
static void want_dump(const struct message *m)
{
    struct kvs_dump_request r = {u32(m, 0), m->fd};
    struct stat st;
    const char *refusal = NULL;
    if (!(session.flags & MAY_DUMP))
        refusal = "dumps are not allowed in this run; only `kvshield audit` allows them";
    else if (r.fd < 0 || fstat(r.fd, &st) != 0 || !S_ISREG(st.st_mode))
        refusal = "a dump goes to a regular file and nowhere else";
    if (refusal) {
        kvs_say("a dump of this engine was asked for: %s", refusal);
        close_fd(r.fd);
        kvs_session_dumped(r.number, refusal);
        return;
    }
    struct kvs_dump_request old;
    pthread_mutex_lock(&session.lock);
    bool replaced = session.dump_wanted;
    old = session.dump;
    session.dump = r;
    session.dump_wanted = true;
    pthread_mutex_unlock(&session.lock);
    if (replaced) {
        close_fd(old.fd);
        kvs_session_dumped(old.number, "another one was asked for before the engine computed");
    }
}

bool kvs_session_dump_wanted(void)
{
    pthread_mutex_lock(&session.lock);
    bool wanted = session.dump_wanted;
    pthread_mutex_unlock(&session.lock);
    return wanted;
}

bool kvs_session_take_dump(struct kvs_dump_request *out)
{
    pthread_mutex_lock(&session.lock);
    bool taken = session.dump_wanted;
    *out = session.dump;
    session.dump_wanted = false;
    pthread_mutex_unlock(&session.lock);
    return taken;
}

/* DUMPED: number, status, and the reason of a refusal. Nobody has to wait for it: a full socket loses it. */
void kvs_session_dumped(uint32_t number, const char *refusal)
{
    uint32_t head[2] = {number, refusal ? 1 : 0};
    uint8_t body[sizeof head + REFUSAL_MAX];
    size_t n = refusal ? strnlen(refusal, REFUSAL_MAX) : 0;
    memcpy(body, head, sizeof head);
    memcpy(body + sizeof head, refusal ? refusal : "", n);
    send_message(session.fd, DUMPED, body, sizeof head + n, -1, MSG_DONTWAIT);
}

bool kvs_session_observes(void)
{
    return (session.flags & OBSERVE) || session.clear;
}

bool kvs_session_resident(void)
{
    return (session.flags & RESIDENT) && !session.clear;
}

bool kvs_session_scrubs(void)
{
    return session.flags & SCRUB;
}

static void *reader(void *arg)
{
    (void)arg;
    static struct message m; /* there is one reader */
    bool welcome = false;
    while (receive_message(session.fd, &m)) {
        if (m.h.type == STOP)
            kvs_die("%.*s", (int)m.h.length, (const char *)m.body);
        if (m.h.type == REFUSED && !welcome) /* said here: the supervisor hangs up next */
            kvs_die("refused: %.*s", (int)m.h.length, (const char *)m.body);
        if (m.h.type == DUMP) {
            want_dump(&m);
            continue;
        }
        if (m.h.type == METER) {
            kvs_meter_attach(m.fd);
            continue;
        }
        welcome = true;
        pthread_mutex_lock(&session.lock);
        if (m.h.type == WELCOME) /* known here before a DUMP that follows */
            session.flags = u32(&m, 4);
        session.reply = m;
        session.have_reply = true;
        pthread_cond_signal(&session.arrived);
        pthread_mutex_unlock(&session.lock);
    }
    kvs_die("the kvshield supervisor is gone; this engine ends because its enclave can no longer be reached");
}

static void start_reader(void)
{
    /* The host's signals are for the host's own threads. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    pthread_t thread;
    int err = pthread_create(&thread, NULL, reader, NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (err != 0)
        kvs_die("cannot start a thread to watch the supervisor: %s", strerror(err));
    pthread_detach(thread);
}

static int dial(void)
{
    const char *path = getenv("KVSHIELD_SOCKET");
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (!path || !*path)
        kvs_die("libkvshield.so is loaded but KVSHIELD_SOCKET is not set; "
                "start this program with `kvshield run -- PROGRAM`");
    if (strlen(path) >= sizeof addr.sun_path)
        kvs_die("KVSHIELD_SOCKET is longer than a socket's path can be (%zu bytes)", sizeof addr.sun_path - 1);
    strcpy(addr.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&addr, sizeof addr) != 0)
        kvs_die("cannot reach the kvshield supervisor at %s: %s; is `kvshield run` or `kvshield serve` still there?",
                path, strerror(errno));
    return fd;
}

/* Sends a request and waits for what answers it. */
static void ask(uint16_t type, const void *body, size_t len, int pass, struct message *out)
{
    pthread_mutex_lock(&session.request);
    if (!send_message(session.fd, type, body, len, pass, 0))
        kvs_die("the kvshield supervisor is gone: %s", strerror(errno));
    pthread_mutex_lock(&session.lock);
    while (!session.have_reply)
        pthread_cond_wait(&session.arrived, &session.lock);
    session.have_reply = false;
    *out = session.reply;
    pthread_mutex_unlock(&session.lock);
    pthread_mutex_unlock(&session.request);
}

static struct message *new_message(void)
{
    struct message *m = calloc(1, sizeof *m);
    if (!m)
        kvs_die("out of memory");
    return m;
}

void kvs_session_begin(const char *engine_version)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&once);
    if (session.fd >= 0 && session.pid != getpid())
        kvs_die("this process was forked from one that had already loaded a model; "
                "kvshield cannot share a data plane between processes: load the model in the child");
    if (session.fd < 0) {
        uint8_t body[256];
        uint32_t pid = (uint32_t)getpid();
        size_t n = strnlen(engine_version, sizeof body - sizeof pid);
        memcpy(body, &pid, sizeof pid);
        memcpy(body + sizeof pid, engine_version, n);
        session.pid = getpid();
        session.fd = dial();
        start_reader();

        struct message *m = new_message();
        ask(HELLO, body, sizeof pid + n, -1, m);
        if (m->h.type != WELCOME || (m->fd < 0 && !kvs_session_observes()))
            kvs_die("the supervisor answered a hello with message %u", m->h.type);
        struct kvs_welcome w = {u32(m, 0), u32(m, 1), u32(m, 2), u32(m, 3), m->fd};
        free(m);
        if (kvs_session_observes())
            close_fd(w.fd);
        else
            kvs_channel_attach(&w);
    }
    pthread_mutex_unlock(&once);
}

/* OPENED: action, model, layers, floats per row, rotary dimensions and base, four lengths and flags, then marker, fingerprint,
 * overlay and rotary pairs. */
static void decode_opened(const struct message *m, struct kvs_opened *out)
{
    size_t at = 11 * sizeof(uint32_t);
    size_t marker = u32(m, 6), fingerprint = u32(m, 7), overlays = u32(m, 8), pairs = u32(m, 9);
    uint32_t base = u32(m, 5);
    if (marker >= sizeof out->marker || fingerprint > sizeof out->fingerprint ||
        overlays > MESSAGE_MAX / sizeof *out->overlay || pairs > KVS_PAIRS_MAX ||
        m->h.length != at + marker + fingerprint + overlays * sizeof *out->overlay + pairs * sizeof *out->pairs)
        kvs_die("the supervisor's answer for a model has impossible lengths");
    out->action = u32(m, 0);
    out->model = u32(m, 1);
    out->layers = u32(m, 2);
    out->row_floats = u32(m, 3);
    out->rotary_dim = u32(m, 4);
    memcpy(&out->rotary_base, &base, sizeof base);
    memcpy(out->marker, m->body + at, marker);
    memcpy(out->fingerprint, m->body + at + marker, fingerprint);
    out->fingerprint_len = fingerprint;
    out->overlays = overlays;
    out->pair_count = pairs;
    out->fixed_heads = u32(m, 10) & FIXED_HEADS;
    memcpy(out->pairs, m->body + at + marker + fingerprint + overlays * sizeof *out->overlay, pairs * sizeof *out->pairs);
    if (overlays > 0) {
        out->overlay = malloc(overlays * sizeof *out->overlay);
        if (!out->overlay)
            kvs_die("out of memory");
        memcpy(out->overlay, m->body + at + marker + fingerprint, overlays * sizeof *out->overlay);
    }
    out->fd = m->fd;
    if (out->action == KVS_ACTION_SHIELD &&
        (m->fd < 0 || out->row_floats == 0 || out->layers == 0 || marker == 0 || fingerprint == 0))
        kvs_die("the supervisor's answer for a model is incomplete");
}

void kvs_session_open(const char *path, int fd, struct kvs_opened *out)
{
    size_t n = strnlen(path, 4096);
    struct message *m = new_message();
    memset(out, 0, sizeof *out);
    out->fd = -1;
    ask(OPEN, path, n, fd, m);
    if (m->h.type == OPENED) {
        decode_opened(m, out);
        if (out->action == KVS_ACTION_SHIELD && kvs_session_observes())
            kvs_die("the supervisor shielded a model that is only to be observed");
        if (out->action == KVS_ACTION_CLEAR) {
            kvs_say("%s runs IN THE CLEAR, as --allow-unshielded says", path);
            session.clear = true;
        }
    } else if (m->h.type == REFUSED) {
        size_t len = m->h.length < sizeof out->refusal ? m->h.length : sizeof out->refusal - 1;
        memcpy(out->refusal, m->body, len);
    } else {
        kvs_die("the supervisor answered a model with message %u", m->h.type);
    }
    free(m);
}

void kvs_session_last_words(const char *message)
{
    if (session.fd >= 0 && session.pid == getpid())
        send_message(session.fd, FATAL, message, strlen(message), -1, MSG_DONTWAIT); /* a frozen supervisor must not keep us */
}
