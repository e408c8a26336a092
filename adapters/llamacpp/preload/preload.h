/* What the files of the preload build share. */
#ifndef KVS_PRELOAD_H
#define KVS_PRELOAD_H

#include "kvs.h"

#define EXPORT __attribute__((visibility("default")))

/* The real function of that name, through the library behind `handle` first; NULL, or the end of the process when it is required. */
KVS_HIDDEN void *kvs_look_up(void *handle, const char *name, const void *own, bool required);
/* The same, through the library to which the code at `caller` belongs. */
typedef uintptr_t (*kvs_function)(uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t);
KVS_HIDDEN kvs_function kvs_real(const char *name, const void *own, const void *caller);

#endif
