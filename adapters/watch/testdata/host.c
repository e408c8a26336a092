/* A program that handles a model file in one of the ways that the watch must tell apart:
 *   host WAY FILE     then says "done" and waits for its end
 * Built with -DEMBED it carries a message of ggml's own code, as an embedded engine does. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef EMBED
__attribute__((used)) static const char embedded[] = "gguf_init_from_file: failed to open";
#endif

static char buf[4 << 20];

static void map(int fd, long size) {
    volatile char *p = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    if ((void *)p == MAP_FAILED) exit(1);
    for (long i = 0; i < size; i += 4096) (void)p[i];
    close(fd);
}

static void bulk(int fd) {
    while (read(fd, buf, 1 << 20) > 0) {}
}

static void positioned(int fd, long size) {
    for (long at = 0; at < size; at += 1 << 20)
        if (pread(fd, buf, 1 << 20, at) <= 0) exit(1);
}

/* What a reader of metadata does: seek to the end for the size, then take the beginning. */
static void header(int fd) {
    lseek(fd, 0, SEEK_END);
    lseek(fd, 0, SEEK_SET);
    if (read(fd, buf, (1 << 20) + 4096) <= 0) exit(1);
    lseek(fd, 0, SEEK_END);
}

/* node-llama-cpp opens the file for every chunk of 4 MiB, and so takes a small model whole. */
static void chunk(int fd, const char *path) {
    for (int i = 0; i < 3; i++) {
        int again = open(path, O_RDONLY);
        if (pread(again, buf, sizeof buf, 0) <= 0) exit(1);
        close(again);
    }
    close(fd);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const char *way = argv[1];
    if (!strcmp(way, "twice")) {
        if (fork() || fork()) return 0;
        way = "map";
    }
    int fd = open(argv[2], O_RDONLY);
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) return 1;
    if (!strcmp(way, "map")) map(fd, st.st_size);
    if (!strcmp(way, "read")) bulk(fd);
    if (!strcmp(way, "pread")) positioned(fd, st.st_size);
    if (!strcmp(way, "header")) header(fd);
    if (!strcmp(way, "chunk")) chunk(fd, argv[2]);
    if (!strcmp(way, "readclose")) { bulk(fd); close(fd); }
    if (!strcmp(way, "quick")) return 0;
    if (!strcmp(way, "fork")) {
        map(fd, st.st_size);
        if (fork()) { pause(); return 0; }
    }
    puts("done");
    fflush(stdout);
    pause();
    return 0;
}
