/*
 * The engine's functions that save, restore and clear its cache. They take and return integers and pointers only, in registers; as
 * many are passed on as any version uses.
 *
 * In mode permute a saved cache may be restored by the process that saved it (state.c). In mode resident it is sealed by the
 * enclave (seal.c), and what a sequence leaves behind is wiped there (record.c).
 */
#include "flavour.h" /* REAL and OTHER, the engine's functions; ENTRY, the name of what stands in for one */
#include "record.h"

/* --- states --- */

/* The engine's own functions for one kind of state. */
struct engine {
    function size, get, set;
};

static size_t sequence_size(const struct kvs_state *s)
{
    return ((const struct engine *)s->functions)->size((uintptr_t)s->context, (uintptr_t)s->sequence, s->flags, 0, 0, 0);
}
static size_t sequence_get(const struct kvs_state *s, uint8_t *dst, size_t size)
{
    return ((const struct engine *)s->functions)->get((uintptr_t)s->context, (uintptr_t)dst, size, (uintptr_t)s->sequence, s->flags, 0);
}
static size_t sequence_set(const struct kvs_state *s, const uint8_t *src, size_t size)
{
    return ((const struct engine *)s->functions)->set((uintptr_t)s->context, (uintptr_t)src, size, (uintptr_t)s->sequence, s->flags, 0);
}
static size_t whole_size(const struct kvs_state *s)
{
    return ((const struct engine *)s->functions)->size((uintptr_t)s->context, 0, 0, 0, 0, 0);
}
static size_t whole_get(const struct kvs_state *s, uint8_t *dst, size_t size)
{
    return ((const struct engine *)s->functions)->get((uintptr_t)s->context, (uintptr_t)dst, size, 0, 0, 0);
}
static size_t whole_set(const struct kvs_state *s, const uint8_t *src, size_t size)
{
    return ((const struct engine *)s->functions)->set((uintptr_t)s->context, (uintptr_t)src, size, 0, 0, 0);
}

static struct kvs_state sequence_state(uintptr_t context, uintptr_t sequence, uintptr_t flags, const struct engine *e)
{
    return (struct kvs_state){(const void *)context, (int32_t)sequence, (uint32_t)flags, sequence_size, sequence_get, sequence_set, e};
}
static struct kvs_state whole_state(uintptr_t context, const struct engine *e)
{
    return (struct kvs_state){(const void *)context, -1, 0, whole_size, whole_get, whole_set, e};
}
/* Without the flags that the functions of older engines do not have, they do the same. */
#define SEQUENCE {OTHER(llama_state_seq_get_size), OTHER(llama_state_seq_get_data), OTHER(llama_state_seq_set_data)}
#define SEQUENCE_EXT {OTHER(llama_state_seq_get_size_ext), OTHER(llama_state_seq_get_data_ext), OTHER(llama_state_seq_set_data_ext)}
#define WHOLE {OTHER(llama_state_get_size), OTHER(llama_state_get_data), OTHER(llama_state_set_data)}

#define FUNCTION(name)                                                                             \
    EXPORT uintptr_t ENTRY(name)(uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t); \
    uintptr_t ENTRY(name)(uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, uintptr_t e, uintptr_t f)

/* A sealed state instead of the engine's own, in mode resident. */
#define SEALED(name, table, make, call)                                                            \
    FUNCTION(name)                                                                                 \
    {                                                                                              \
        if (!kvs_session_resident() || kvs_own_call())                                                               \
            return REAL(name)(a, b, c, d, e, f);                                                   \
        const struct engine own = table;                                                           \
        const struct kvs_state s = make;                                                           \
        return call;                                                                               \
    }
#define DST (uint8_t *)b, c
#define SRC (const uint8_t *)b, c

SEALED(llama_state_get_size, WHOLE, whole_state(a, &own), kvs_sealed_size(&s))
SEALED(llama_state_get_data, WHOLE, whole_state(a, &own), kvs_sealed_get(&s, DST))
SEALED(llama_state_set_data, WHOLE, whole_state(a, &own), kvs_sealed_set(&s, SRC))
SEALED(llama_state_seq_get_size, SEQUENCE, sequence_state(a, b, 0, &own), kvs_sealed_size(&s))
SEALED(llama_state_seq_get_data, SEQUENCE, sequence_state(a, d, 0, &own), kvs_sealed_get(&s, DST))
SEALED(llama_state_seq_set_data, SEQUENCE, sequence_state(a, d, 0, &own), kvs_sealed_set(&s, SRC))
SEALED(llama_state_seq_get_size_ext, SEQUENCE_EXT, sequence_state(a, b, c, &own), kvs_sealed_size(&s))
SEALED(llama_state_seq_get_data_ext, SEQUENCE_EXT, sequence_state(a, d, e, &own), kvs_sealed_get(&s, DST))
SEALED(llama_state_seq_set_data_ext, SEQUENCE_EXT, sequence_state(a, d, e, &own), kvs_sealed_set(&s, SRC))

/* Files: permuted ones are remembered, in mode resident they are sealed. */
#define FILE_FUNCTION(name, table, make, sealed, plain)                                            \
    FUNCTION(name)                                                                                 \
    {                                                                                              \
        const char *path = (const char *)b;                                                        \
        if (!kvs_session_resident() || kvs_own_call())                                                               \
            plain                                                                                  \
        const struct engine own = table;                                                           \
        const struct kvs_state s = make;                                                           \
        return sealed;                                                                             \
    }
#define SAVE(name)                                                                                 \
    {                                                                                              \
        uintptr_t result = REAL(name)(a, b, c, d, e, f);                                           \
        kvs_state_saved(path);                                                                     \
        return result;                                                                             \
    }
#define LOAD(name) return kvs_state_may_load(path) ? REAL(name)(a, b, c, d, e, f) : 0;

FILE_FUNCTION(llama_state_save_file, WHOLE, whole_state(a, &own), kvs_sealed_save(&s, path, (const int32_t *)c, d) > 0,
              SAVE(llama_state_save_file))
FILE_FUNCTION(llama_state_load_file, WHOLE, whole_state(a, &own),
              kvs_sealed_load(&s, path, (int32_t *)c, d, (size_t *)e) > 0, LOAD(llama_state_load_file))
FILE_FUNCTION(llama_state_seq_save_file, SEQUENCE, sequence_state(a, c, 0, &own),
              kvs_sealed_save(&s, path, (const int32_t *)d, e), SAVE(llama_state_seq_save_file))
FILE_FUNCTION(llama_state_seq_load_file, SEQUENCE, sequence_state(a, c, 0, &own),
              kvs_sealed_load(&s, path, (int32_t *)d, e, (size_t *)f), LOAD(llama_state_seq_load_file))

/* Their names until 2024. */
#define REFUSED(name)                                                                              \
    FUNCTION(name)                                                                                 \
    {                                                                                              \
        if (!kvs_session_resident() || kvs_own_call())                                                               \
            return REAL(name)(a, b, c, d, e, f);                                                   \
        kvs_say(#name " is refused in mode resident; a newer program calls llama_state_...");      \
        return 0;                                                                                  \
    }
REFUSED(llama_get_state_size)
REFUSED(llama_copy_state_data)
REFUSED(llama_set_state_data)

/* --- sequences --- */

FUNCTION(llama_get_memory)
{
    uintptr_t memory = REAL(llama_get_memory)(a, b, c, d, e, f);
    if (kvs_session_resident())
        kvs_context_memory((const void *)a, (const void *)memory);
    return memory;
}

FUNCTION(llama_free)
{
    kvs_context_freed((const void *)a);
    return REAL(llama_free)(a, b, c, d, e, f);
}

static function get_size, get_data;
static size_t state_size(const void *context)
{
    return get_size((uintptr_t)context, 0, 0, 0, 0, 0);
}
static size_t state_data(const void *context, uint8_t *dst, size_t size)
{
    return get_data((uintptr_t)context, (uintptr_t)dst, size, 0, 0, 0);
}
static const struct kvs_states states = {state_size, state_data};

/* Takes cells from sequences; whole says whether a sequence may be gone with it. */
#define REMOVES(name, whole)                                                                       \
    FUNCTION(name)                                                                                 \
    {                                                                                              \
        function own = REAL(name);                                                                 \
        if (!kvs_session_resident() || kvs_own_call())                                                               \
            return own(a, b, c, d, e, f);                                                          \
        get_size = OTHER(llama_state_get_size);                                                    \
        get_data = OTHER(llama_state_get_data);                                                    \
        kvs_cells_removing(&states, (const void *)a);                                              \
        uintptr_t result = own(a, b, c, d, e, f);                                                  \
        kvs_cells_removed(&states, (const void *)a, whole);                                        \
        return result;                                                                             \
    }
REMOVES(llama_memory_seq_rm, (int32_t)c <= 0 && (int32_t)d < 0)
REMOVES(llama_memory_seq_keep, true)
REMOVES(llama_memory_clear, true)
REMOVES(llama_memory_seq_cp, true)
REMOVES(llama_memory_seq_add, false)
