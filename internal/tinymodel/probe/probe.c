/*
 * Loads models with an engine's own libllama, one after the other, and says what the engine says about them.
 * Only functions are relied on, no headers: parameters go through as opaque bytes.
 *
 *   probe LIBLLAMA list          the architectures that the library knows, one a line
 *   probe LIBLLAMA BACKENDS      reads paths from standard input; for each, the engine's log and LOADED or FAILED
 */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* Larger than llama_model_params in any version: callee and caller agree on where it begins. */
struct params {
    char bytes[1024];
};

static void say(int level, const char *text, void *user)
{
    (void)level;
    (void)user;
    fputs(text, stdout);
}

static int list(void *llama)
{
    const char *(*name)(int) = (const char *(*)(int))dlsym(llama, "_Z13llm_arch_name8llm_arch");
    if (!name)
        return 3;
    for (int i = 0; i < 1000; i++) {
        const char *text = name(i);
        if (!text || strcmp(text, "unknown") == 0 || strcmp(text, "(unknown)") == 0)
            break;
        puts(text);
    }
    return 0;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    void *llama = argc == 3 ? dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) : NULL;
    if (!llama) {
        fprintf(stderr, "%s\n", argc == 3 ? dlerror() : "usage: probe LIBLLAMA list|BACKENDS");
        return 2;
    }
    if (strcmp(argv[2], "list") == 0)
        return list(llama);
    struct params (*defaults)(void) = (struct params (*)(void))dlsym(llama, "llama_model_default_params");
    void *(*load)(const char *, struct params) = (void *(*)(const char *, struct params))dlsym(llama, "llama_model_load_from_file");
    void (*drop)(void *) = (void (*)(void *))dlsym(llama, "llama_model_free");
    void (*log)(void (*)(int, const char *, void *), void *) =
        (void (*)(void (*)(int, const char *, void *), void *))dlsym(llama, "llama_log_set");
    void (*backends)(const char *) = (void (*)(const char *))dlsym(llama, "ggml_backend_load_all_from_path");
    if (!defaults || !load || !drop || !log || !backends)
        return 3;
    log(say, NULL);
    backends(argv[2]);
    char line[4096];
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        void *model = load(line, defaults());
        puts(model ? "\nLOADED" : "\nFAILED");
        fflush(stdout);
        if (model)
            drop(model);
    }
    return 0;
}
