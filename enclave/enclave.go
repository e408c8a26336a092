// Package enclave is the contract of a kvshield enclave: what the untrusted side may ask of it,
// and nothing that holds a key.
//
// Start with [Loader]. In mode permute Load turns a model into a shielded model, and [Inverter] undoes the
// permutation on every layer's attention output (enclave/vault). In mode resident [Store] keeps keys and values and
// computes attention over them (enclave/resident). Either runs in a process of its own; package plugin carries this contract across the process boundary.
//
// Limits: a shielded model is a permuted model. It stops somebody who reads the KV cache and does
// not expect a permutation (docs/modes.md). Promises: no value of this package ever holds
// key material, and an implementation answers hostile input with an error, never with a panic.
package enclave

import (
	"context"
	"errors"
	"fmt"
)

// ModelID names a loaded model within one enclave process. It is never reused and never zero.
type ModelID uint32

// LoadRequest names the files of one model. Output i belongs to source i.
type LoadRequest struct {
	// Sources are the GGUF files of the model, in the order of their split numbers.
	Sources []string
	// Outputs are existing, empty, writable files that receive the shielded model. The enclave
	// writes the header and the attention tensors; the caller copies the rest as Copies says.
	Outputs []string
}

// Copy is one range of bytes that goes from a source to its output unchanged.
type Copy struct {
	File   int   // index into Sources and Outputs
	From   int64 // offset in the source, bytes
	To     int64 // offset in the output, bytes
	Length int64 // bytes
}

// Action is what has to be done with a GGUF file before an engine may open it.
type Action int

const (
	// Shield: a language model; the engine gets the shielded model instead.
	Shield Action = iota + 1
	// Pass: a file without attention weights of a language model (a projector, a control
	// vector); the engine opens it as it is.
	Pass
	// Reside: a language model whose KV cache the enclave keeps; the engine opens it as it is.
	Reside
)

// Model describes a model and what shielding it takes. Nothing in it is secret.
type Model struct {
	Action       Action
	Architecture string // general.architecture
	Name         string // general.name, may be empty
	Files        int    // files of the model: 1, or the number of splits
	Layers       int
	Heads        int     // query heads
	HeadsKV      int     // key/value heads; of both, those of the layer that has most
	HeadDim      int     // head dimension, of values
	RowFloats    int     // floats in one row of a layer's attention output, at most: Heads * HeadDim
	RotaryDim    int     // rows of a key head that are rotated; 0 without a rotary embedding
	RotaryBase   float32 // base of the rotary frequencies that the shielded model was made for
	Context      int     // positions that the model was made for; 0 when it does not say
	CacheFloats  int64   // keys and values of one token, in all layers together; 0 when it is not known
	Bytes        int64   // size of the model's files together
	ShieldBytes  int64   // bytes that the enclave rewrites: attention tensors
}

// LoadResult is a shielded model, ready once the caller has done the copies.
type LoadResult struct {
	ID ModelID
	Model
	// Fingerprint is how a graph of this load is told from a graph of any other: the bytes of the
	// tensor named Marker as they lie in the shielded model. It is as public as that model.
	Fingerprint []byte
	Marker      string
	// Pairs says which rotary pair stands at each place of a query or key head: twice its number, plus one where its two rows are
	// swapped. The engine's graphs must be given frequency factors that follow; empty when those are in the shielded model.
	// Whoever sees either has the other.
	Pairs []uint16
	// FixedHeads says that heads stay in their places, so that a bias which differs from head to head (ALiBi) is right.
	FixedHeads bool
	Copies     []Copy
	// OutputSizes are the sizes in bytes that the outputs have when the copies are done.
	OutputSizes []int64
}

// Loader makes shielded models.
type Loader interface {
	// Inspect says what would be done with the model, without keys and without writing.
	Inspect(ctx context.Context, sources []string) (Model, error)
	// Load draws a fresh key, writes the shielded model and keeps what is needed to invert.
	// A model whose Action is Pass gets no ID and no copies.
	Load(ctx context.Context, req LoadRequest) (LoadResult, error)
	// Unload wipes the keys and permutations of a model.
	Unload(ctx context.Context, id ModelID) error
}

// Inverter undoes the permutation (KV-Shield, arXiv 2409.04040, section 4: run time phase).
type Inverter interface {
	// Invert reads rows of a layer's attention output from src, each RowFloats long, and writes
	// the rows that the unshielded model would have computed to dst. len(dst) must be len(src) and a
	// multiple of RowFloats; dst and src must not overlap.
	Invert(id ModelID, layer int, dst, src []float32) error
}

// Report says what protects this enclave.
type Report struct {
	Backend   string   // "sgx" or "software"
	Hardware  bool     // whether hardware protects the enclave's memory
	Statement string   // one plain sentence for people
	Evidence  []byte   // remote attestation report, bound to the nonce; empty without hardware
	Hardening []string // what the software backend obtained from the kernel
	Missing   []string // what it asked for and did not get, with the reason
}

// Attester reports on the enclave. The nonce, at most 64 bytes, is bound into the evidence.
type Attester interface {
	Attest(ctx context.Context, nonce []byte) (Report, error)
}

// ErrUnknownModel is returned for a model that was never loaded or has been unloaded.
var ErrUnknownModel = errors.New("no such model in the enclave")

// RefusedError is a sound model file that this mode cannot shield.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return e.Reason }

// Refuse makes a RefusedError.
func Refuse(format string, a ...any) error { return &RefusedError{fmt.Sprintf(format, a...)} }

// InvalidError is a file that is not a sound model, or cannot be read.
type InvalidError struct{ Reason string }

func (e *InvalidError) Error() string { return e.Reason }

// Invalid makes an InvalidError.
func Invalid(format string, a ...any) error { return &InvalidError{fmt.Sprintf(format, a...)} }
