package main

import (
	"flag"
	"fmt"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/resident"
)

// residentFlags are the settings of mode resident.
type residentFlags struct {
	memory  int64
	storage string
	threads int
}

func (r *residentFlags) register() {
	flag.Int64Var(&r.memory, "memory", 0, "mode resident: bytes of KV caches (0: half of the machine's memory)")
	flag.StringVar(&r.storage, "storage", "", "mode resident: f16, f32 or q8_0, whatever the engine's own cache type")
	flag.IntVar(&r.threads, "threads", 0, "mode resident: threads that compute attention (0: a default)")
}

func (r *residentFlags) keeper(digest func(enclave.ModelID) ([32]byte, bool)) (enclave.Keeper, error) {
	options := resident.Options{Limit: r.memory, Threads: r.threads, Digest: digest}
	if r.storage != "" {
		s, ok := map[string]enclave.Storage{"f16": enclave.StorageF16, "f32": enclave.StorageF32, "q8_0": enclave.StorageQ8_0}[r.storage]
		if !ok {
			return nil, fmt.Errorf("there is no storage %q", r.storage)
		}
		options.Storage = &s
	}
	return resident.New(options)
}
