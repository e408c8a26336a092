package vault

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"maps"
	"sync"
	"sync/atomic"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/shield"
)

// Options configure a vault.
type Options struct {
	// Random is where keys come from; nil is the system's generator. Another source is for tests.
	Random io.Reader
}

// Vault holds the permutations of loaded models.
type Vault struct {
	random io.Reader
	// models is replaced as a whole, so that Invert finds a model without a lock.
	models atomic.Pointer[map[enclave.ModelID]*model]

	mu     sync.Mutex // guards what follows, random, and the replacing of models
	last   enclave.ModelID
	prints map[string]bool // fingerprints in use, of models that are being loaded too
}

var (
	_ enclave.Loader   = (*Vault)(nil)
	_ enclave.Inverter = (*Vault)(nil)
)

// New returns an empty vault.
func New(opts Options) *Vault {
	v := &Vault{random: opts.Random, prints: map[string]bool{}}
	if v.random == nil {
		v.random = rand.Reader
	}
	v.models.Store(&map[enclave.ModelID]*model{})
	return v
}

// Inspect says what would be done with the model.
func (v *Vault) Inspect(ctx context.Context, sources []string) (enclave.Model, error) {
	if err := ctx.Err(); err != nil {
		return enclave.Model{}, err
	}
	in, err := openSources(sources)
	if err != nil {
		return enclave.Model{}, err
	}
	defer in.close()
	plan, err := shield.Read(in.files)
	if err != nil {
		return enclave.Model{}, err
	}
	return plan.Model, nil
}

// Load makes a shielded model.
func (v *Vault) Load(ctx context.Context, req enclave.LoadRequest) (enclave.LoadResult, error) {
	in, err := openSources(req.Sources)
	if err != nil {
		return enclave.LoadResult{}, err
	}
	defer in.close()
	plan, err := shield.Read(in.files)
	if err != nil {
		return enclave.LoadResult{}, err
	}
	if plan.Model.Action == enclave.Pass {
		return enclave.LoadResult{Model: plan.Model}, nil
	}
	out, err := openOutputs(req.Outputs, len(in.files))
	if err != nil {
		return enclave.LoadResult{}, err
	}
	defer out.close()
	res, err := v.shield(ctx, plan, in, out)
	if err != nil {
		return enclave.LoadResult{}, errors.Join(err, out.empty())
	}
	return res, nil
}

// shield draws a permutation, writes the shielded model and takes its inverse into the vault.
func (v *Vault) shield(ctx context.Context, plan *shield.Plan, in *sources, out outputs) (enclave.LoadResult, error) {
	own, err := readMarker(plan, in.files)
	if err != nil {
		return enclave.LoadResult{}, err
	}
	d, err := v.draw(plan, own)
	if err != nil {
		return enclave.LoadResult{}, err
	}
	defer d.permutation.Wipe()
	kept := false
	defer func() {
		if !kept {
			v.release(d.print)
		}
	}()
	res, err := write(ctx, plan, d, in, out)
	if err != nil {
		return enclave.LoadResult{}, err
	}
	if res.ID, err = v.keep(plan.Shape, d); err != nil {
		return enclave.LoadResult{}, err
	}
	kept = true
	return res, nil
}

// keep gives a model its number and makes it known to Invert.
func (v *Vault) keep(s shield.Shape, d *drawn) (enclave.ModelID, error) {
	m, err := newModel(s, d)
	if err != nil {
		return 0, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.last+1 == 0 {
		m.wipe()
		return 0, errors.New("all model numbers are used up: restart the enclave")
	}
	v.last++
	v.replace(func(models map[enclave.ModelID]*model) { models[v.last] = m })
	return v.last, nil
}

// replace changes the models that Invert finds. The caller holds the mutex.
func (v *Vault) replace(change func(map[enclave.ModelID]*model)) {
	models := maps.Clone(*v.models.Load())
	change(models)
	v.models.Store(&models)
}

// Unload wipes the permutation of a model, once running Inverts are done with it.
func (v *Vault) Unload(_ context.Context, id enclave.ModelID) error {
	v.mu.Lock()
	m := (*v.models.Load())[id]
	if m != nil {
		v.replace(func(models map[enclave.ModelID]*model) { delete(models, id) })
	}
	v.mu.Unlock()
	if m == nil {
		return enclave.ErrUnknownModel
	}
	m.wipe()
	v.release(m.print)
	return nil
}

func (v *Vault) release(print string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.prints, print)
}

// Invert undoes the permutation of a layer's attention output.
func (v *Vault) Invert(id enclave.ModelID, layer int, dst, src []float32) error {
	m := (*v.models.Load())[id]
	if m == nil {
		return enclave.ErrUnknownModel
	}
	return m.invert(layer, dst, src)
}
