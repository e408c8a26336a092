/*
 * The hook's meter by itself, over the memory that is descriptor 3. Commands on standard input, one a line:
 *
 *   bucket NS                         prints the histogram's bucket
 *   begin NOW
 *   transition LAYER START NS ENCLAVE_NS BYTES
 *   end NOW TOKENS [SEQUENCE TOKENS]…
 */
#include "../../core/meter.c"

#include <inttypes.h>
#include <stdlib.h>

void kvs_die(const char *format, ...)
{
    fprintf(stderr, "%s\n", format);
    _exit(1);
}

static void end(char *rest)
{
    static struct kvs_part parts[KVS_PARTS_MAX];
    size_t count = 0;
    int64_t now = strtoll(rest, &rest, 10);
    uint32_t tokens = (uint32_t)strtoul(rest, &rest, 10);
    for (; *rest == ' '; count++) {
        parts[count].sequence = (int32_t)strtol(rest, &rest, 10);
        parts[count].tokens = (uint32_t)strtoul(rest, &rest, 10);
    }
    kvs_meter_end(now, tokens, parts, count);
}

int main(void)
{
    char line[1 << 14];
    int64_t a, b;
    uint64_t worked;
    uint32_t layer;
    size_t bytes;
    if (fcntl(3, F_GETFD) >= 0)
        kvs_meter_attach(3);
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "bucket %" SCNd64, &a) == 1)
            printf("%zu\n", bucket(a));
        else if (sscanf(line, "begin %" SCNd64, &a) == 1)
            kvs_meter_begin(a);
        else if (sscanf(line, "transition %" SCNu32 " %" SCNd64 " %" SCNd64 " %" SCNu64 " %zu", &layer, &a, &b, &worked, &bytes) == 5)
            kvs_meter_transition(layer, a, b, worked, bytes);
        else if (strncmp(line, "end ", 4) == 0)
            end(line + 4);
        else
            kvs_die(line);
    }
    return 0;
}
