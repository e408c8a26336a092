package vault

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"io"
	"sync"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/shield"
)

// Register is the Loader of mode resident: it draws no key and writes nothing, it only remembers which models there are, so that
// a saved cache is restored for none but the model it was saved from.
type Register struct {
	mu      sync.Mutex
	last    enclave.ModelID
	digests map[enclave.ModelID][32]byte
}

var _ enclave.Loader = (*Register)(nil)

// NewRegister returns an empty one.
func NewRegister() *Register { return &Register{digests: map[enclave.ModelID][32]byte{}} }

// Inspect says what would be done with the model.
func (r *Register) Inspect(ctx context.Context, sources []string) (enclave.Model, error) {
	if err := ctx.Err(); err != nil {
		return enclave.Model{}, err
	}
	in, err := openSources(sources)
	if err != nil {
		return enclave.Model{}, err
	}
	defer in.close()
	return shield.Identify(in.files)
}

// Load gives the model a number. It has no outputs.
func (r *Register) Load(ctx context.Context, req enclave.LoadRequest) (enclave.LoadResult, error) {
	if err := ctx.Err(); err != nil {
		return enclave.LoadResult{}, err
	}
	in, err := openSources(req.Sources)
	if err != nil {
		return enclave.LoadResult{}, err
	}
	defer in.close()
	m, err := shield.Identify(in.files)
	if err != nil || m.Action == enclave.Pass {
		return enclave.LoadResult{Model: m}, err
	}
	sum, err := digest(in.files)
	if err != nil {
		return enclave.LoadResult{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last++
	r.digests[r.last] = sum
	return enclave.LoadResult{ID: r.last, Model: m}, nil
}

// Unload forgets a model.
func (r *Register) Unload(_ context.Context, id enclave.ModelID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.digests[id]; !ok {
		return enclave.ErrUnknownModel
	}
	delete(r.digests, id)
	return nil
}

// Digest is what a model is told by: SHA-256 over its files' headers and samples of their weights.
func (r *Register) Digest(id enclave.ModelID) ([32]byte, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	d, ok := r.digests[id]
	return d, ok
}

const (
	digestSamples = 64
	digestSample  = 4096
)

// digest does not read a model whole, which would cost its load time again: two models that differ only between the samples
// pass for one, and then a saved cache of one is restored for the other, as a stock engine would.
func digest(files []shield.File) (sum [32]byte, err error) {
	h := sha256.New()
	for _, f := range files {
		if err := digestFile(h, f); err != nil {
			return sum, err
		}
	}
	return [32]byte(h.Sum(nil)), nil
}

func digestFile(h hash.Hash, f shield.File) error {
	h.Write(binary.LittleEndian.AppendUint64(nil, uint64(f.Size)))
	if _, err := io.Copy(h, io.NewSectionReader(f.Data, 0, f.DataOffset)); err != nil {
		return enclave.Invalid("%s: %v", f.Name, withoutPath(err))
	}
	data := f.Size - f.DataOffset
	for i := range int64(digestSamples) {
		at := f.DataOffset + data/digestSamples*i
		if _, err := io.Copy(h, io.NewSectionReader(f.Data, at, digestSample)); err != nil {
			return enclave.Invalid("%s: %v", f.Name, withoutPath(err))
		}
	}
	return nil
}
