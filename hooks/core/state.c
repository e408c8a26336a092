/*
 * Files into which an engine saves its cache (slot files, prompt caches). What they hold is permuted by the key of one
 * load: restored into another load it would be read with the wrong permutation. So only files that this process has
 * saved, and that nobody has changed since, may be restored.
 */
#include "kvs.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/stat.h>

struct saved {
    dev_t dev;
    ino_t ino;
    off_t size;
    struct timespec changed;
    struct saved *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct saved *files;

void kvs_state_saved(const char *path)
{
    struct stat st;
    struct saved *s = calloc(1, sizeof *s);
    if (!s)
        kvs_die("out of memory");
    if (stat(path, &st) != 0) {
        free(s);
        return; /* not saved after all: the engine has its own error */
    }
    *s = (struct saved){st.st_dev, st.st_ino, st.st_size, st.st_ctim, NULL};
    pthread_mutex_lock(&lock);
    s->next = files;
    files = s;
    pthread_mutex_unlock(&lock);
}

bool kvs_state_may_load(const char *path)
{
    struct stat st;
    if (kvs_session_observes() || stat(path, &st) != 0)
        return true; /* nothing is shielded, or the engine's own error is the right one */
    pthread_mutex_lock(&lock);
    const struct saved *s = files;
    while (s && !(s->dev == st.st_dev && s->ino == st.st_ino && s->size == st.st_size &&
                  s->changed.tv_sec == st.st_ctim.tv_sec && s->changed.tv_nsec == st.st_ctim.tv_nsec))
        s = s->next;
    pthread_mutex_unlock(&lock);
    if (!s)
        kvs_say("%s: saved under another key, or changed since: a shielded cache can be restored only by the process that "
                "saved it; refused",
                path);
    return s != NULL;
}
