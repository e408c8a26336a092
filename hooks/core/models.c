/* The models that were exchanged in this process, and which of them a graph belongs to. */
#include "kvs.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MATCH_CACHE 64

/* One exchange at a time; graphs of other models go on meanwhile, so it is not held under `lock`. */
static pthread_mutex_t exchanging = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct kvs_model *models; /* newest first */
static char architectures[128];  /* of the models whose caches the enclave keeps, for messages */

/*
 * Which marker tensors were already compared with the fingerprints. Addresses are reused after a
 * model is freed, but not before another one was opened: an exchange empties the cache.
 */
static struct {
    const struct ggml_tensor *tensor;
    struct kvs_model *model;
} matched[MATCH_CACHE];

static bool is_gguf(int fd)
{
    char magic[4];
    return pread(fd, magic, sizeof magic, 0) == sizeof magic && memcmp(magic, "GGUF", sizeof magic) == 0;
}

static int open_model(const char *path, struct stat *st)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -1;
    if (fstat(fd, st) == 0 && S_ISREG(st->st_mode) && is_gguf(fd))
        return fd;
    close(fd);
    return -1;
}

static int64_t mtime_ns(const struct stat *st)
{
    return (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
}

/*
 * An engine may open a model several times for one load (to measure what fits, then to load): as
 * long as no graph of it has run and the file is the same, that is one load and one key.
 */
static struct kvs_model *same_load(const char *path, const struct stat *st)
{
    pthread_mutex_lock(&lock);
    struct kvs_model *m = models;
    while (m && strcmp(m->path, path) != 0)
        m = m->next;
    bool same = m && !m->used && m->dev == (int64_t)st->st_dev && m->ino == (int64_t)st->st_ino &&
                m->size == st->st_size && m->mtime_ns == mtime_ns(st);
    pthread_mutex_unlock(&lock);
    return same ? m : NULL;
}

static struct kvs_model *add(const char *path, const struct stat *st, const struct kvs_opened *info, int fd)
{
    struct kvs_model *m = calloc(1, sizeof *m);
    char *copy = strdup(path);
    if (!m || !copy)
        kvs_die("out of memory");
    m->info = *info;
    m->path = copy;
    m->original = info->overlays > 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;
    if (info->overlays > 0 && m->original < 0)
        kvs_die("cannot keep the model file open: %s", strerror(errno));
    m->dev = (int64_t)st->st_dev;
    m->ino = (int64_t)st->st_ino;
    m->size = st->st_size;
    m->mtime_ns = mtime_ns(st);
    pthread_mutex_lock(&lock);
    m->next = models;
    models = m;
    memset(matched, 0, sizeof matched);
    pthread_mutex_unlock(&lock);
    return m;
}

static void note_architecture(const char *name)
{
    pthread_mutex_lock(&lock);
    size_t have = strlen(architectures);
    if (!strstr(architectures, name))
        snprintf(architectures + have, sizeof architectures - have, "%s%s", have ? ", " : "", name);
    pthread_mutex_unlock(&lock);
}

const char *kvs_architectures(void)
{
    return *architectures ? architectures : "a model of no known architecture";
}

static char refusal[sizeof((struct kvs_opened *)0)->refusal]; /* the last one */

const char *kvs_refusal(void)
{
    return refusal;
}

bool kvs_exchange(const char *path, struct kvs_model **model, bool *refused)
{
    struct stat st;
    *model = NULL;
    *refused = false;
    int fd = open_model(path, &st);
    if (fd < 0)
        return false; /* the engine's own error is the right one */

    pthread_mutex_lock(&exchanging);
    *model = same_load(path, &st);
    if (!*model) {
        struct kvs_opened info;
        kvs_session_open(path, fd, &info);
        if (info.action == KVS_ACTION_SHIELD)
            *model = add(path, &st, &info, fd);
        else if (info.action == KVS_ACTION_RESIDE)
            note_architecture(info.marker);
        else if (info.action == KVS_ACTION_REFUSE) {
            kvs_say("error: %s: %s", path, info.refusal);
            memcpy(refusal, info.refusal, sizeof refusal);
            *refused = true;
        }
    }
    pthread_mutex_unlock(&exchanging);
    close(fd);
    return *model != NULL;
}

bool kvs_exchange_fd(int fd, bool *refused)
{
    struct kvs_opened info;
    *refused = false;
    if (!is_gguf(fd))
        return false;
    kvs_session_open("(an open file)", fd, &info);
    if (info.action == KVS_ACTION_PASS || info.action == KVS_ACTION_RESIDE || info.action == KVS_ACTION_CLEAR)
        return false;
    if (info.fd >= 0)
        close(info.fd);
    free(info.overlay);
    kvs_say("error: this program opens its model through a FILE*, which kvshield cannot exchange; "
            "have it open the model by its path");
    *refused = true;
    return true;
}

struct kvs_model *kvs_exchanged(const char *path)
{
    pthread_mutex_lock(&lock);
    struct kvs_model *m = models;
    while (m && strcmp(m->path, path) != 0)
        m = m->next;
    pthread_mutex_unlock(&lock);
    return m;
}

struct kvs_model *kvs_model_of_file(int fd)
{
    struct stat want, have;
    pthread_mutex_lock(&lock);
    struct kvs_model *m = models;
    bool any = false;
    for (const struct kvs_model *p = m; p; p = p->next)
        any |= p->original >= 0;
    if (!any || fstat(fd, &want) != 0)
        m = NULL;
    while (m && !(m->original >= 0 && fstat(m->info.fd, &have) == 0 && have.st_dev == want.st_dev &&
                  have.st_ino == want.st_ino))
        m = m->next;
    pthread_mutex_unlock(&lock);
    return m;
}

void kvs_model_consumed(struct kvs_model *m)
{
    pthread_mutex_lock(&lock);
    m->consumed = true;
    pthread_mutex_unlock(&lock);
}

void kvs_model_path(const struct kvs_model *m, char *out, size_t len)
{
    snprintf(out, len, "/proc/self/fd/%d", m->info.fd);
}

/* Ollama's own engine gives every layer its copy of the model's frequency factors, "blk.N.NAME". */
static bool is_named(const char *marker, const char *name)
{
    size_t digits = strncmp(name, "blk.", 4) == 0 ? strspn(name + 4, "0123456789") : 0;
    return strcmp(marker, name) == 0 || (digits > 0 && name[4 + digits] == '.' && strcmp(marker, name + 5 + digits) == 0);
}

bool kvs_model_is_marker(const char *name)
{
    pthread_mutex_lock(&lock);
    struct kvs_model *m = models;
    while (m && !is_named(m->info.marker, name))
        m = m->next;
    pthread_mutex_unlock(&lock);
    return m != NULL;
}

bool kvs_models_in_graph(void)
{
    pthread_mutex_lock(&lock);
    struct kvs_model *m = models;
    while (m && m->info.pair_count == 0)
        m = m->next;
    pthread_mutex_unlock(&lock);
    return m != NULL;
}

static struct kvs_model *compare(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    uint8_t bytes[KVS_FINGERPRINT_MAX];
    size_t have = g->nbytes(t);
    if (have > sizeof bytes)
        have = sizeof bytes;
    g->tensor_get(t, bytes, 0, have);
    for (struct kvs_model *m = models; m; m = m->next)
        if (m->info.fingerprint_len == have && memcmp(m->info.fingerprint, bytes, have) == 0)
            return m;
    return NULL;
}

struct kvs_model *kvs_model_of_marker(const struct kvs_ggml *g, const struct ggml_tensor *t)
{
    size_t slot = ((uintptr_t)t / 64) % MATCH_CACHE;
    pthread_mutex_lock(&lock);
    if (matched[slot].tensor != t) {
        matched[slot].tensor = t;
        matched[slot].model = compare(g, t);
    }
    struct kvs_model *m = matched[slot].model;
    pthread_mutex_unlock(&lock);
    return m;
}

void kvs_model_used(struct kvs_model *m)
{
    pthread_mutex_lock(&lock);
    /* A model in several files was exchanged file by file, under one number. */
    for (struct kvs_model *f = m->used ? NULL : models; f; f = f->next) {
        if (f->info.model != m->info.model)
            continue;
        f->used = true;
        /* The engine holds its own mapping or copy by now: let go of the file's memory. */
        close(f->info.fd);
        f->info.fd = -1;
        if (f->original >= 0) {
            if (!f->consumed)
                kvs_die("this engine read its model in a way that kvshield does not know");
            close(f->original);
            f->original = -1;
        }
    }
    pthread_mutex_unlock(&lock);
}
