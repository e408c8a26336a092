// Package keys is the key schedule of a shielded model: one fresh root per load, a sub-key per
// purpose, and an unbiased shuffle for each sub-key.
//
// Start with [New]; [Root.Stream] gives the randomness of one purpose; [Root.Destroy] ends it.
//
// The root is 32 uniform bytes in secret memory. A sub-key is HKDF-Expand with SHA-256 (RFC 5869)
// over an info string such as "kvshield/v1/permute/layer=3/kvhead=1/v"; the extract step is left
// out because the root is uniform already. A sub-key seeds ChaCha8 (C2SP chacha8rand, through
// math/rand/v2), which fits for three reasons: its output is fixed by a specification, so the
// vectors in the tests hold for every Go release; the best known attacks reach seven of its
// rounds, while a stream here is a few hundred bytes under a key used once; and, unlike an AES key
// schedule, its state can be overwritten when the stream is done.
//
// Limits: the standard library's HMAC keeps the root in buffers of its own until the garbage
// collector reuses them, so wiping is complete only for what this package holds. Processes that
// hold keys must not be dumpable. Promises: the same root and info give the same permutation; the
// root is zeroed by Destroy and a sub-key by [Stream.Close].
package keys

import (
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/kvshield/kvshield/enclave/internal/secmem"
)

// Size is the length of a root and of every sub-key, in bytes.
const Size = 32

// Root is the key of one load. Its methods may be called by one goroutine at a time.
type Root struct{ mem *secmem.Region }

// New draws a root from random, or from the system's generator when random is nil.
func New(random io.Reader) (*Root, error) {
	if random == nil {
		random = rand.Reader
	}
	mem, err := secmem.New(Size)
	if err != nil {
		return nil, fmt.Errorf("no memory for a key: %w", err)
	}
	if _, err := io.ReadFull(random, mem.Bytes()); err != nil {
		mem.Wipe()
		return nil, fmt.Errorf("no randomness for a key: %w", err)
	}
	return &Root{mem}, nil
}

// errDestroyed is a mistake of the caller, kept an error so that it never becomes a zero key.
var errDestroyed = errors.New("the key has been destroyed")

// Stream returns the randomness for one purpose, named by info. Close it.
func (r *Root) Stream(info string) (*Stream, error) {
	if r.mem == nil {
		return nil, errDestroyed
	}
	sub, err := hkdf.Expand(sha256.New, r.mem.Bytes(), info, Size)
	if err != nil {
		return nil, fmt.Errorf("no sub-key for %s: %w", info, err)
	}
	defer clear(sub)
	return newStream((*[Size]byte)(sub)), nil
}

// Destroy zeroes the root. It may be called more than once.
func (r *Root) Destroy() {
	if r.mem == nil {
		return
	}
	r.mem.Wipe()
	r.mem = nil
}
