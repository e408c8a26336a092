package shield

import (
	"io"
	"math"
	"slices"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/internal/gguf"
)

// File is one parsed file of a model.
type File struct {
	*gguf.File
	Name string // for messages
	Data io.ReaderAt
}

// Target is a tensor whose rows are permuted.
type Target struct {
	File     int
	Tensor   gguf.Tensor
	Layer    int
	Role     Role
	RowBytes int64
	First    int64 // the role's first row, in a tensor of several roles
}

// Marker is where the frequency factors of the shielded model stand. A Tensor without a size is not
// in the model yet and has to be added to the file.
type Marker struct {
	File   int
	Tensor gguf.Tensor
}

// Plan is what shielding a model takes. Nothing in it is secret. Only Model is set when there is
// nothing to shield.
type Plan struct {
	Model   enclave.Model
	Shape   Shape
	Targets []Target
	Marker  Marker
	// InGraph says that the frequency factors go into the engine's graph; the marker is a tensor of the model then, of which the
	// last bits are made its own.
	InGraph bool
}

// Read makes the plan for a model, given its files in the order of their split numbers.
func Read(files []File) (*Plan, error) {
	if len(files) == 0 {
		return nil, enclave.Invalid("a model needs at least one file")
	}
	if err := checkSplits(files); err != nil {
		return nil, err
	}
	m := metadata{file: files[0]}
	p := &Plan{Model: describeFiles(&m, files)}
	kind := m.text("general.type", "")
	if m.err != nil {
		return nil, m.err
	}
	if pass, err := passes(files, p.Model.Architecture, kind); pass || err != nil {
		return p, err
	}
	if encoders[p.Model.Architecture] {
		geometry(&p.Model, files[0])
		return p, nil
	}
	if err := checkState(files); err != nil {
		return nil, err
	}
	p.Model.Context, p.Model.CacheFloats = cacheSize(files[0], p.Model.Architecture)
	return p, p.shield(files)
}

// shield fills in what is needed for a language model.
func (p *Plan) shield(files []File) error {
	name := p.Model.Architecture
	m := metadata{file: files[0], prefix: name + "."}
	arch, err := lookUp(&m, files)
	if err != nil {
		return err
	}
	if p.Shape = m.shape(arch); m.err != nil {
		return m.err
	}
	if !m.oneRotation() || hasTensor(files, "rope_factors_long.weight") {
		arch.factors = ""
	}
	if err := p.find(arch, files); err != nil {
		return err
	}
	p.describe()
	return nil
}

func hasTensor(files []File, name string) bool {
	return slices.ContainsFunc(files, func(f File) bool {
		return slices.ContainsFunc(f.Tensors, func(t gguf.Tensor) bool { return t.Name == name })
	})
}

func (p *Plan) describe() {
	p.Model.Action = enclave.Shield
	p.Model.Layers, p.Model.Heads, p.Model.HeadsKV = p.Shape.Layers, p.Shape.Heads, p.Shape.HeadsKV
	p.Model.HeadDim, p.Model.RowFloats = p.Shape.ValueDim, p.Shape.RowFloats()
	p.Model.RotaryDim, p.Model.RotaryBase = p.Shape.RotDim, p.Shape.Base
	p.Model.ShieldBytes = int64(p.Shape.RotDim/2) * 4
	for _, t := range p.Targets {
		heads, rows := p.Shape.HeadRows(t.Role, t.Layer)
		p.Model.ShieldBytes += int64(heads) * int64(rows) * t.RowBytes
	}
}

func checkSplits(files []File) error {
	total := uint64(0)
	for i, f := range files {
		total += uint64(len(f.Tensors))
		m := metadata{file: f, prefix: "split."}
		count, number := m.count("count", 1), m.count("no", 0)
		switch {
		case m.err != nil:
			return m.err
		case max(count, 1) != len(files):
			return enclave.Invalid("%s: it belongs to a model of %d files, %d given: name all of them, in order", f.Name, count, len(files))
		case number != i:
			return enclave.Invalid("%s: it is number %d of %d files, given as number %d: name them in order", f.Name, number+1, count, i+1)
		}
	}
	m := metadata{file: files[0], prefix: "split."}
	if n := m.count("tensors.count", math.MaxInt32); m.err == nil && m.has("tensors.count") && uint64(n) != total {
		return enclave.Invalid("%s: the model should have %d tensors, its files have %d", files[0].Name, n, total)
	}
	return m.err
}
