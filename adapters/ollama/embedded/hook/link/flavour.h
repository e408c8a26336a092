/* How hooks/core/states.c finds the engine's functions in the linked build: the linker's --wrap renames both ends. */
#ifndef KVS_LINKED_FLAVOUR_H
#define KVS_LINKED_FLAVOUR_H

#include "kvs.h"

#define EXPORT
typedef uintptr_t (*function)(uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t);

#define ENTRY(name) __wrap_##name
#define REAL(name) __real_##name
#define OTHER(name) __real_##name

/* Weak: a function that this version of the engine lacks is not called by it either. */
#define STATE_FUNCTION(name)                                                                       \
    extern uintptr_t __real_##name(uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t) __attribute__((weak));
STATE_FUNCTION(llama_state_get_size)
STATE_FUNCTION(llama_state_get_data)
STATE_FUNCTION(llama_state_set_data)
STATE_FUNCTION(llama_state_seq_get_size)
STATE_FUNCTION(llama_state_seq_get_data)
STATE_FUNCTION(llama_state_seq_set_data)
STATE_FUNCTION(llama_state_seq_get_size_ext)
STATE_FUNCTION(llama_state_seq_get_data_ext)
STATE_FUNCTION(llama_state_seq_set_data_ext)
STATE_FUNCTION(llama_state_save_file)
STATE_FUNCTION(llama_state_load_file)
STATE_FUNCTION(llama_state_seq_save_file)
STATE_FUNCTION(llama_state_seq_load_file)
STATE_FUNCTION(llama_get_state_size)
STATE_FUNCTION(llama_copy_state_data)
STATE_FUNCTION(llama_set_state_data)
STATE_FUNCTION(llama_get_memory)
STATE_FUNCTION(llama_free)
STATE_FUNCTION(llama_memory_seq_rm)
STATE_FUNCTION(llama_memory_seq_keep)
STATE_FUNCTION(llama_memory_clear)
STATE_FUNCTION(llama_memory_seq_cp)
STATE_FUNCTION(llama_memory_seq_add)

#endif
