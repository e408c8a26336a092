/*
 * A shielded model without a copy of the whole: its memory file holds the header and the attention tensors, and has holes
 * where the original is unchanged. An engine maps its model, or reads it through a stream; either way the holes are
 * filled from the original here.
 */
#define _GNU_SOURCE
#include "kvs.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *map(void *at, size_t len, int prot, int flags, int fd, int64_t offset)
{
    return (void *)syscall(SYS_mmap, at, len, prot, flags, fd, (long)offset);
}

#define HUGE_PAGE ((uintptr_t)2 << 20)

/*
 * Room of `len` bytes that begins with a huge page. The original's pages keep their places within huge pages in the shielded
 * model, so that the kernel can map them large, as it does for a stock engine.
 */
static uint8_t *reserve(size_t len)
{
    uint8_t *room = map(NULL, len + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return room;
    uint8_t *base = room + (-(uintptr_t)room & (HUGE_PAGE - 1));
    size_t page = (size_t)sysconf(_SC_PAGESIZE), end = (len + page - 1) / page * page;
    if (base > room)
        munmap(room, (size_t)(base - room));
    if (room + HUGE_PAGE + end > base + end)
        munmap(base + end, (size_t)(room + HUGE_PAGE - base));
    return base;
}

void *kvs_overlay_map(const struct kvs_model *m, size_t len, int prot, int flags)
{
    uint8_t *base = reserve(len);
    if (base == MAP_FAILED)
        return base;
    /* Populating the memory file would fill its holes with zeros. */
    if (map(base, len, prot, (flags & ~MAP_POPULATE) | MAP_FIXED, m->info.fd, 0) == MAP_FAILED) {
        munmap(base, len);
        return MAP_FAILED;
    }
    for (size_t i = 0; i < m->info.overlays; i++) {
        const struct kvs_range *r = &m->info.overlay[i];
        if (r->to + r->length > len ||
            map(base + r->to, r->length, prot, flags | MAP_FIXED, m->original, r->from) == MAP_FAILED) {
            int err = errno;
            munmap(base, len);
            errno = err;
            return MAP_FAILED;
        }
    }
    return base;
}

/* --- streams --- */

struct stream {
    int memory, original;
    int64_t position, size;
    struct kvs_range *overlay; /* in the order of `to` */
    size_t overlays;
    FILE *file;
    struct stream *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stream *streams;

/* Where to read at the stream's position, and how far that goes. */
static ssize_t read_part(const struct stream *s, char *buf, size_t len)
{
    int64_t end = s->size;
    for (size_t i = 0; i < s->overlays; i++) {
        const struct kvs_range *r = &s->overlay[i];
        int64_t to = (int64_t)r->to, after = to + (int64_t)r->length;
        if (s->position >= after)
            continue;
        if (s->position >= to) {
            size_t left = (size_t)(after - s->position);
            return pread(s->original, buf, len < left ? len : left, (int64_t)r->from + s->position - to);
        }
        end = to;
        break;
    }
    size_t left = end > s->position ? (size_t)(end - s->position) : 0;
    return pread(s->memory, buf, len < left ? len : left, s->position);
}

static ssize_t stream_read(void *cookie, char *buf, size_t len)
{
    struct stream *s = cookie;
    size_t done = 0;
    while (done < len) {
        ssize_t n = read_part(s, buf + done, len - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        if (n == 0)
            break;
        s->position += n;
        done += (size_t)n;
    }
    return (ssize_t)done;
}

static int stream_seek(void *cookie, off64_t *offset, int whence)
{
    struct stream *s = cookie;
    int64_t base = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? s->position : s->size;
    if (base + *offset < 0) {
        errno = EINVAL;
        return -1;
    }
    s->position = *offset = base + *offset;
    return 0;
}

static void release(struct stream *s)
{
    close(s->memory);
    close(s->original);
    free(s->overlay);
    free(s);
}

static int stream_close(void *cookie)
{
    struct stream *s = cookie;
    pthread_mutex_lock(&lock);
    struct stream **at = &streams;
    while (*at && *at != s)
        at = &(*at)->next;
    if (*at)
        *at = s->next;
    pthread_mutex_unlock(&lock);
    release(s);
    return 0;
}

static struct stream *new_stream(const struct kvs_model *m)
{
    struct stat st;
    struct stream *s = calloc(1, sizeof *s);
    size_t bytes = m->info.overlays * sizeof *s->overlay;
    if (s)
        s->overlay = malloc(bytes);
    if (!s || !s->overlay || fstat(m->info.fd, &st) != 0)
        kvs_die("out of memory");
    memcpy(s->overlay, m->info.overlay, bytes);
    s->overlays = m->info.overlays;
    s->size = st.st_size;
    /* Descriptors of its own: the model's are closed once a graph of it has run. */
    s->memory = fcntl(m->info.fd, F_DUPFD_CLOEXEC, 0);
    s->original = fcntl(m->original, F_DUPFD_CLOEXEC, 0);
    if (s->memory < 0 || s->original < 0)
        kvs_die("cannot open the shielded model: %s", strerror(errno));
    return s;
}

FILE *kvs_overlay_open(const struct kvs_model *m)
{
    struct stream *s = new_stream(m);
    cookie_io_functions_t io = {.read = stream_read, .seek = stream_seek, .close = stream_close};
    s->file = fopencookie(s, "r", io);
    if (!s->file) {
        release(s);
        return NULL;
    }
    FILE *file = s->file;
    pthread_mutex_lock(&lock);
    s->next = streams;
    streams = s;
    pthread_mutex_unlock(&lock);
    return file;
}

int kvs_overlay_fileno(FILE *file)
{
    pthread_mutex_lock(&lock);
    const struct stream *s = streams;
    while (s && s->file != file)
        s = s->next;
    int fd = s ? s->memory : -1;
    pthread_mutex_unlock(&lock);
    return fd;
}

void kvs_model_complete(struct kvs_model *m)
{
    if (m->original < 0)
        return;
    struct stream *s = new_stream(m);
    static char buf[1 << 20];
    int whole = memfd_create("kvshield-model", MFD_CLOEXEC);
    if (whole < 0)
        kvs_die("no memory for the shielded model: %s", strerror(errno));
    for (ssize_t n; (n = stream_read(s, buf, sizeof buf)) != 0;)
        if (n < 0 || write(whole, buf, (size_t)n) != n)
            kvs_die("the shielded model cannot be copied: %s; it needs as much free memory as the model's file has bytes", strerror(errno));
    release(s);
    close(m->info.fd);
    close(m->original);
    m->info.fd = whole;
    m->original = -1;
    kvs_model_consumed(m);
}
