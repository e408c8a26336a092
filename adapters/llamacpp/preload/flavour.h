/* How hooks/core/states.c finds the engine's functions in the preload build. */
#include "preload.h"

typedef kvs_function function;

#define ENTRY(name) name
#define REAL(name) kvs_real(#name, (const void *)(uintptr_t)(name), __builtin_return_address(0))
#define OTHER(name) kvs_real(#name, NULL, __builtin_return_address(0))
