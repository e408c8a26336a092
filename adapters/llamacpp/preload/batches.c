/*
 * Looks at what the engine puts into its batches, so that what a graph costs can be told apart by sequence.
 *
 * These entry points change from version to version and take structures by value. So nothing of a call is understood here but
 * the few registers that are looked at: what stands in for each function saves every register that can hold an argument,
 * looks, restores them, and jumps to the engine's own with the stack as it was. Only on x86-64; elsewhere the engine's
 * functions are called directly, and sequences are not known.
 */
#define _GNU_SOURCE
#include "meter.h"
#include "preload.h"

#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#ifdef __x86_64__

/* The arguments of a call: registers in the order of the calling convention, then what lies on the stack. */
struct call {
    const uintptr_t *registers;
    const void *stack;
    const void *caller;
};

/*
 * 192 bytes below the frame pointer: six integer registers, rax (the number of vector registers of a variadic call), a gap, eight
 * vector registers. The stack is aligned to 16 there, as it was misaligned by 8 on entry.
 */
#define STAND_IN(name)                                                                             \
    __asm__(".text\n"                                                                              \
            ".globl " #name "\n"                                                                   \
            ".type " #name ", @function\n" #name ":\n"                                             \
            "  endbr64\n"                                                                          \
            "  pushq %rbp\n"                                                                       \
            "  movq %rsp, %rbp\n"                                                                  \
            "  subq $192, %rsp\n"                                                                  \
            "  movq %rdi, 0(%rsp)\n"                                                               \
            "  movq %rsi, 8(%rsp)\n"                                                               \
            "  movq %rdx, 16(%rsp)\n"                                                              \
            "  movq %rcx, 24(%rsp)\n"                                                              \
            "  movq %r8, 32(%rsp)\n"                                                               \
            "  movq %r9, 40(%rsp)\n"                                                               \
            "  movq %rax, 48(%rsp)\n"                                                              \
            "  movups %xmm0, 64(%rsp)\n"                                                           \
            "  movups %xmm1, 80(%rsp)\n"                                                           \
            "  movups %xmm2, 96(%rsp)\n"                                                           \
            "  movups %xmm3, 112(%rsp)\n"                                                          \
            "  movups %xmm4, 128(%rsp)\n"                                                          \
            "  movups %xmm5, 144(%rsp)\n"                                                          \
            "  movups %xmm6, 160(%rsp)\n"                                                          \
            "  movups %xmm7, 176(%rsp)\n"                                                          \
            "  movq %rsp, %rdi\n"                                                                  \
            "  leaq 16(%rbp), %rsi\n"                                                              \
            "  movq 8(%rbp), %rdx\n"                                                               \
            "  call look_at_" #name "\n"                                                           \
            "  movq %rax, %r11\n"                                                                  \
            "  movq 0(%rsp), %rdi\n"                                                               \
            "  movq 8(%rsp), %rsi\n"                                                               \
            "  movq 16(%rsp), %rdx\n"                                                              \
            "  movq 24(%rsp), %rcx\n"                                                              \
            "  movq 32(%rsp), %r8\n"                                                               \
            "  movq 40(%rsp), %r9\n"                                                               \
            "  movq 48(%rsp), %rax\n"                                                              \
            "  movups 64(%rsp), %xmm0\n"                                                           \
            "  movups 80(%rsp), %xmm1\n"                                                           \
            "  movups 96(%rsp), %xmm2\n"                                                           \
            "  movups 112(%rsp), %xmm3\n"                                                          \
            "  movups 128(%rsp), %xmm4\n"                                                          \
            "  movups 144(%rsp), %xmm5\n"                                                          \
            "  movups 160(%rsp), %xmm6\n"                                                          \
            "  movups 176(%rsp), %xmm7\n"                                                          \
            "  leave\n"                                                                            \
            "  jmpq *%r11\n"                                                                       \
            ".size " #name ", .-" #name "\n")

#define LOOK(name, see)                                                                            \
    extern char name[];                                                                            \
    KVS_HIDDEN kvs_function look_at_##name(const uintptr_t *registers, const void *stack, const void *caller); \
    kvs_function look_at_##name(const uintptr_t *registers, const void *stack, const void *caller)  \
    {                                                                                              \
        static _Thread_local struct {                                                              \
            const void *caller;                                                                    \
            kvs_function real;                                                                     \
        } last;                                                                                    \
        if (last.caller != caller) {                                                               \
            last.real = kvs_real(#name, name, caller);                                             \
            last.caller = caller;                                                                  \
        }                                                                                          \
        see(&(struct call){registers, stack, caller});                                             \
        return last.real;                                                                          \
    }                                                                                              \
    STAND_IN(name)

static const void *batch_of(const struct call *c)
{
    return (const void *)c->registers[0];
}

static void added(const struct call *c)
{
    kvs_batch_add(batch_of(c), (int32_t)c->registers[1]);
}

static void cleared(const struct call *c)
{
    kvs_batch_clear(batch_of(c));
}

static void freed(const struct call *c)
{
    kvs_batch_free(batch_of(c));
}

static void handed_in(const struct call *c)
{
    kvs_batch_begin((const void *)c->registers[2]);
}

/* What llama_decode takes by value since 2023, on the stack. Nothing of it is believed: it is read as another process's memory is. */
struct old_batch {
    int32_t tokens;
    const void *token, *embd, *pos;
    const int32_t *sequence_counts;
    int32_t *const *sequences;
    const void *logits;
};

#define READ_MOST 512 /* tokens of a batch that are read at a time */

static bool read_own(void *to, const struct iovec *from, size_t count, size_t size)
{
    struct iovec into = {to, size};
    return process_vm_readv(getpid(), &into, 1, from, count, 0) == (ssize_t)size;
}

static bool read_sequences(const struct old_batch *b, int32_t first, int32_t n, int32_t *to)
{
    int32_t *lists[READ_MOST];
    struct iovec from[READ_MOST] = {{(void *)(uintptr_t)(b->sequences + first), (size_t)n * sizeof *lists}};
    if (!read_own(lists, from, 1, (size_t)n * sizeof *lists))
        return false;
    for (int32_t i = 0; i < n; i++)
        from[i] = (struct iovec){lists[i], sizeof *to};
    return read_own(to, from, (size_t)n, (size_t)n * sizeof *to);
}

static void decoded(const struct call *c)
{
    struct old_batch b;
    struct iovec from = {(void *)(uintptr_t)c->stack, sizeof b};
    kvs_batch_begin_sequences(NULL, 0);
    if (!read_own(&b, &from, 1, sizeof b) || b.tokens <= 0 || b.tokens > 1 << 16)
        return;
    int32_t *sequences = calloc((size_t)b.tokens, sizeof *sequences); /* all of the first, where none are given */
    bool known = sequences != NULL;
    for (int32_t i = 0; known && b.sequences && i < b.tokens; i += READ_MOST)
        known = read_sequences(&b, i, b.tokens - i < READ_MOST ? b.tokens - i : READ_MOST, sequences + i);
    if (known)
        kvs_batch_begin_sequences(sequences, (size_t)b.tokens);
    free(sequences);
}

LOOK(llama_batch_ext_add, added);
LOOK(llama_batch_ext_add_token, added);
LOOK(llama_batch_ext_add_embd, added);
LOOK(llama_batch_ext_clear, cleared);
LOOK(llama_batch_ext_free, freed);
LOOK(llama_process, handed_in);
LOOK(llama_decode, decoded);

#endif
