/*
 * A host of libllama for the tests of the hook. It loads libllama with local scope, as Node and Python do, and carries out the
 * actions named on its command line, one line of output each:
 *
 *     host LIBLLAMA BACKENDS MODEL ACTION...
 *
 * It declares what it needs of llama.h itself. A structure that is passed by value gets more room than any version needs:
 * the callee uses as much of it as it knows.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

struct params { void *room[64]; };
struct batch { void *room[32]; };
struct ggml_tensor;
typedef bool (*callback)(struct ggml_tensor *, bool, void *);

static void *libllama;
static const char *model_path;
static void *model, *context;
static callback installed;
static unsigned long asked, seen;
static double sum;

static void *get(const char *name)
{
    void *f = dlsym(libllama, name);
    if (!f) {
        fprintf(stderr, "host: no %s\n", name);
        exit(9);
    }
    return f;
}
#define CALL(result, name, ...) ((result(*)(__VA_ARGS__))get(name))

static bool is_attention(struct ggml_tensor *t)
{
    return strcmp(CALL(const char *, "ggml_get_name", struct ggml_tensor *)(t), "kqv_out-0") == 0;
}

static bool observe(struct ggml_tensor *t, bool ask, void *user)
{
    (void)user;
    if (ask) {
        asked++;
        return is_attention(t);
    }
    seen++;
    size_t n = CALL(size_t, "ggml_nbytes", struct ggml_tensor *)(t);
    float *values = malloc(n);
    CALL(void, "ggml_backend_tensor_get", struct ggml_tensor *, void *, size_t, size_t)(t, values, 0, n);
    for (size_t i = 0; i < n / sizeof *values; i++)
        sum += values[i];
    free(values);
    return true;
}

static bool stop(struct ggml_tensor *t, bool ask, void *user)
{
    return observe(t, ask, user) && ask;
}

/* cb_eval and its argument are the two null pointers before the types of the cache, both F16 (1). */
static void install(struct params *p, callback cb)
{
    for (size_t i = 0; i + 3 <= sizeof p->room / sizeof *p->room; i++) {
        int types[2];
        memcpy(types, &p->room[i + 2], sizeof types);
        if (p->room[i] || p->room[i + 1] || types[0] != 1 || types[1] != 1)
            continue;
        memcpy(&p->room[i], &cb, sizeof cb);
        return;
    }
    fprintf(stderr, "host: no cb_eval in this version's context parameters\n");
    exit(9);
}

static void *load_path(struct params p)
{
    return CALL(void *, "llama_model_load_from_file", const char *, struct params)(model_path, p);
}

static void *load_stream(struct params p)
{
    FILE *f = fopen(model_path, "rb");
    return f ? CALL(void *, "llama_model_load_from_file_ptr", FILE *, struct params)(f, p) : NULL;
}

static void load(void *(*how)(struct params))
{
    struct params p = CALL(struct params, "llama_model_default_params", void)();
    model = how(p);
    if (!model) {
        puts("load failed");
        return;
    }
    p = CALL(struct params, "llama_context_default_params", void)();
    if (installed)
        install(&p, installed);
    context = CALL(void *, "llama_init_from_model", void *, struct params)(model, p);
    puts(context ? "load ok" : "no context");
}

static void unload(void)
{
    CALL(void, "llama_free", void *)(context);
    CALL(void, "llama_model_free", void *)(model);
    puts("unload ok");
}

static void decode(void)
{
    int32_t tokens[3] = {1, 20, 30};
    struct batch b = CALL(struct batch, "llama_batch_get_one", int32_t *, int32_t)(tokens, 3);
    int status = CALL(int, "llama_decode", void *, struct batch)(context, b);
    const float *logits = status ? NULL : CALL(float *, "llama_get_logits_ith", void *, int32_t)(context, -1);
    if (logits)
        printf("decode %.6g %.6g %.6g\n", (double)logits[0], (double)logits[1], (double)logits[2]);
    else
        printf("decode stopped\n");
}

/* One of two contexts that compute at the same time: a greedy text, from a token of its own. */
struct speaker {
    void *context;
    int32_t said[48];
};

static void *speak(void *arg)
{
    struct speaker *s = arg;
    int vocabulary = CALL(int, "llama_vocab_n_tokens", const void *)(
        CALL(const void *, "llama_model_get_vocab", const void *)(model));
    for (size_t i = 0; i + 1 < sizeof s->said / sizeof *s->said; i++) {
        struct batch b = CALL(struct batch, "llama_batch_get_one", int32_t *, int32_t)(&s->said[i], 1);
        if (CALL(int, "llama_decode", void *, struct batch)(s->context, b) != 0)
            return NULL;
        const float *logits = CALL(float *, "llama_get_logits_ith", void *, int32_t)(s->context, -1);
        for (int t = 1; t < vocabulary; t++)
            if (logits[t] > logits[s->said[i + 1]])
                s->said[i + 1] = t;
    }
    return NULL;
}

static void speak_in_turns(void)
{
    pthread_t threads[2];
    struct speaker speakers[2] = {{.said = {40}}, {.said = {90}}};
    for (int i = 0; i < 2; i++) {
        struct params p = CALL(struct params, "llama_context_default_params", void)();
        speakers[i].context = CALL(void *, "llama_init_from_model", void *, struct params)(model, p);
    }
    for (int i = 0; i < 2; i++)
        pthread_create(&threads[i], NULL, speak, &speakers[i]);
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        printf("speaker %d:", i);
        for (size_t j = 0; j < sizeof speakers[i].said / sizeof *speakers[i].said; j++)
            printf(" %d", speakers[i].said[j]);
        putchar('\n');
        CALL(void, "llama_free", void *)(speakers[i].context);
    }
}

static void observed(void)
{
    printf("asked %s, seen %lu, sum %.6g\n", asked > seen ? "about more" : "about none", seen, sum);
}

static void in_child(void (*action)(void))
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (action)
            action();
        fflush(stdout);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    printf("child ended with %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
}

static void idle(void)
{
    fflush(stdout);
    for (;;)
        pause();
}

static void act(const char *action)
{
    if (!strcmp(action, "observe"))
        installed = observe;
    else if (!strcmp(action, "stop"))
        installed = stop;
    else if (!strcmp(action, "load"))
        load(load_path);
    else if (!strcmp(action, "load-stream"))
        load(load_stream);
    else if (!strcmp(action, "unload"))
        unload();
    else if (!strcmp(action, "decode"))
        decode();
    else if (!strcmp(action, "speak"))
        speak_in_turns();
    else if (!strcmp(action, "observed"))
        observed();
    else if (!strcmp(action, "child-decodes"))
        in_child(decode);
    else if (!strcmp(action, "child"))
        in_child(NULL);
    else if (!strcmp(action, "idle"))
        idle();
    else
        exit(8);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    if (argc < 5)
        return 8;
    model_path = argv[3];
    libllama = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!libllama) {
        fprintf(stderr, "host: %s\n", dlerror());
        return 9;
    }
    CALL(void, "ggml_backend_load_all_from_path", const char *)(argv[2]);
    CALL(void, "llama_backend_init", void)();
    for (int i = 4; i < argc; i++)
        act(argv[i]);
    return 0;
}
