// Package hook is the layer-execution hook as it is linked into kvshield-ollama. Importing it wraps the calls that Ollama's two
// engines make into ggml; the C behind it is hooks/core, in the archive that `make ollama` builds first.
//
// A process must say what it is before it loads a model, with [None], [Off], [Llama] or [Ollama]; until then a computation ends it.
package hook

// #cgo LDFLAGS: ${SRCDIR}/../../../../.engine/ollama/libkvshook.a
// #cgo LDFLAGS: -Wl,--wrap=gguf_init_from_file
// #cgo LDFLAGS: -Wl,--wrap=ggml_fopen
// #cgo LDFLAGS: -Wl,--wrap=fileno
// #cgo LDFLAGS: -Wl,--wrap=mmap
// #cgo LDFLAGS: -Wl,--wrap=ggml_backend_sched_set_eval_callback
// #cgo LDFLAGS: -Wl,--wrap=ggml_graph_compute
// #cgo LDFLAGS: -Wl,--wrap=ggml_backend_sched_graph_compute_async
// #cgo LDFLAGS: -Wl,--wrap=ggml_backend_sched_alloc_graph
// #cgo LDFLAGS: -Wl,--wrap=ggml_backend_sched_reserve
// #cgo LDFLAGS: -Wl,--wrap=ggml_backend_buffer_clear
// #cgo LDFLAGS: -Wl,--wrap=ggml_backend_buffer_free
// #cgo LDFLAGS: -Wl,--wrap=ggml_backend_tensor_copy
// #cgo LDFLAGS: -Wl,--wrap=ggml_backend_tensor_get
// #cgo LDFLAGS: -Wl,--wrap=ggml_backend_tensor_set
// #cgo LDFLAGS: -Wl,--wrap=llama_state_get_size
// #cgo LDFLAGS: -Wl,--wrap=llama_state_get_data
// #cgo LDFLAGS: -Wl,--wrap=llama_state_set_data
// #cgo LDFLAGS: -Wl,--wrap=llama_state_seq_get_size
// #cgo LDFLAGS: -Wl,--wrap=llama_state_seq_get_data
// #cgo LDFLAGS: -Wl,--wrap=llama_state_seq_set_data
// #cgo LDFLAGS: -Wl,--wrap=llama_state_seq_get_size_ext
// #cgo LDFLAGS: -Wl,--wrap=llama_state_seq_get_data_ext
// #cgo LDFLAGS: -Wl,--wrap=llama_state_seq_set_data_ext
// #cgo LDFLAGS: -Wl,--wrap=llama_state_save_file
// #cgo LDFLAGS: -Wl,--wrap=llama_state_load_file
// #cgo LDFLAGS: -Wl,--wrap=llama_state_seq_save_file
// #cgo LDFLAGS: -Wl,--wrap=llama_state_seq_load_file
// #cgo LDFLAGS: -Wl,--wrap=llama_get_state_size
// #cgo LDFLAGS: -Wl,--wrap=llama_copy_state_data
// #cgo LDFLAGS: -Wl,--wrap=llama_set_state_data
// #cgo LDFLAGS: -Wl,--wrap=llama_get_memory
// #cgo LDFLAGS: -Wl,--wrap=llama_free
// #cgo LDFLAGS: -Wl,--wrap=llama_memory_seq_rm
// #cgo LDFLAGS: -Wl,--wrap=llama_memory_seq_keep
// #cgo LDFLAGS: -Wl,--wrap=llama_memory_clear
// #cgo LDFLAGS: -Wl,--wrap=llama_memory_seq_cp
// #cgo LDFLAGS: -Wl,--wrap=llama_memory_seq_add
// #include "link/link.h"
// #include <stdlib.h>
// extern void kvshield_look(void);
import "C"

import (
	"unsafe"

	"github.com/kvshield/kvshield/adapters/ollama/embedded/cells"
)

// None is a process that computes nothing: a server, a client. It may read a model's vocabulary.
func None() { C.kvs_link_is(C.KVS_LINK_NONE) }

// Off is a runner that is not shielded.
func Off() { C.kvs_link_is(C.KVS_LINK_OFF) }

// Llama is a runner of llama.cpp, whose models are exchanged when it opens them.
func Llama() { C.kvs_link_is(C.KVS_LINK_LLAMA) }

// RefusedError says why a model cannot be shielded. The hook has said it on standard error.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return e.Reason }

const pathMax = 4096

// Ollama is a runner of Ollama's own engine, which reads models in Go. It gets the path to open instead of model.
func Ollama(model string) (string, error) {
	C.kvs_link_is(C.KVS_LINK_OLLAMA)
	caches = cells.Follow()
	C.kvs_link_watch((*[0]byte)(C.kvshield_look))
	if model == "" {
		return "", nil
	}
	name := C.CString(model)
	defer C.free(unsafe.Pointer(name))
	out := (*C.char)(C.malloc(pathMax))
	defer C.free(unsafe.Pointer(out))
	if C.kvs_link_open(name, out, pathMax) == 0 {
		return "", &RefusedError{C.GoString(out)}
	}
	return C.GoString(out), nil
}

var caches *cells.Caches

// kvshield_look is called before each graph of Ollama's own engine in mode resident.
//
//export kvshield_look
func kvshield_look() {
	caches.Look(func(keys unsafe.Pointer, stay []uint32) {
		C.kvs_link_keep(keys, (*C.uint32_t)(unsafe.SliceData(stay)))
	})
}
