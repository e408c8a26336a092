#include "kvs.h"

#include <poll.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

#define PRINT_WITHIN_MS 1000

#define SAID "kvshield: "
/* A program that started this one looks for such a word in what it prints, to tell its own client why it ended. */
#define DIED SAID "error: "

static size_t line(char *out, size_t len, const char *prefix, const char *format, va_list args)
{
    size_t start = strlen(prefix);
    memcpy(out, prefix, start);
    int n = vsnprintf(out + start, len - start - 1, format, args);
    size_t end = strlen(out);
    (void)n; /* a longer message is cut, not lost */
    out[end] = '\n';
    return end + 1;
}

/* The process is to end even when nobody empties the pipe that its messages go to. */
static void print(const char *text, size_t len)
{
    struct pollfd out = {.fd = STDERR_FILENO, .events = POLLOUT};
    while (len > 0 && poll(&out, 1, PRINT_WITHIN_MS) > 0) {
        ssize_t n = write(STDERR_FILENO, text, len);
        if (n <= 0)
            return;
        text += n;
        len -= (size_t)n;
    }
}

void kvs_say(const char *format, ...)
{
    char text[1024] = {0};
    va_list args;
    va_start(args, format);
    size_t n = line(text, sizeof text, SAID, format, args);
    va_end(args);
    print(text, n);
}

void kvs_die(const char *format, ...)
{
    char text[1024] = {0};
    va_list args;
    va_start(args, format);
    size_t n = line(text, sizeof text, DIED, format, args);
    va_end(args);
    print(text, n);
    text[n - 1] = 0;
    kvs_session_last_words(text + sizeof DIED - 1);
    /* No atexit handlers: they belong to an engine whose state can no longer be trusted. */
    _exit(1);
}
