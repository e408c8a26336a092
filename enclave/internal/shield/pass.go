package shield

import (
	"strings"

	"github.com/kvshield/kvshield/enclave"
)

// passes says whether an engine may open the files as they are. It goes by what engines go by: the
// architecture says what a file can be loaded as, and a mere label such as general.type does not.
func passes(files []File, architecture, kind string) (bool, error) {
	switch {
	case architecture == "":
		return false, enclave.Invalid("%s: no key \"general.architecture\", it is not a model that an engine can load", files[0].Name)
	case architecture == "clip", architecture == "controlvector":
		return true, nil
	case kind == "adapter":
		return true, checkAdapter(files)
	}
	return !hasLayers(files), nil
}

// Identify says what mode resident does with a model, which is the same for every architecture: the graph decides whether its
// attention is understood.
func Identify(files []File) (enclave.Model, error) {
	if len(files) == 0 {
		return enclave.Model{}, enclave.Invalid("a model needs at least one file")
	}
	if err := checkSplits(files); err != nil {
		return enclave.Model{}, err
	}
	m := metadata{file: files[0]}
	out := describeFiles(&m, files)
	kind := m.text("general.type", "")
	if m.err != nil {
		return enclave.Model{}, m.err
	}
	if out.Architecture == "" {
		_, err := passes(files, "", kind)
		return enclave.Model{}, err
	}
	if kind == "adapter" {
		return out, nil // what it adds to keys and values is kept like the rest of them
	}
	if pass, err := passes(files, out.Architecture, kind); pass || err != nil {
		return out, err
	}
	if err := checkState(files); err != nil {
		return enclave.Model{}, err
	}
	out.Action = enclave.Reside
	geometry(&out, files[0])
	if encoders[out.Architecture] {
		out.CacheFloats = 0
	}
	return out, nil
}

// geometry fills in what the metadata says of attention, where it is the same in all layers. It is for people: the engine's graph is what
// counts.
func geometry(out *enclave.Model, f File) {
	out.Context, out.CacheFloats = cacheSize(f, out.Architecture)
	m := metadata{file: f, prefix: out.Architecture + "."}
	s := Shape{Layers: m.count("block_count", 0), Heads: m.same("attention.head_count", 0)}
	s.HeadsKV = m.same("attention.head_count_kv", s.Heads)
	if m.err != nil || s.Heads == 0 {
		return
	}
	s.ValueDim = m.count("attention.value_length", m.count("embedding_length", 0)/s.Heads)
	if m.err == nil {
		out.Layers, out.Heads, out.HeadsKV, out.HeadDim = s.Layers, s.Heads, s.HeadsKV, s.ValueDim
	}
}

// describeFiles is what every model has, whatever is done with it.
func describeFiles(m *metadata, files []File) enclave.Model {
	out := enclave.Model{
		Action:       enclave.Pass,
		Architecture: m.text("general.architecture", ""),
		Name:         m.text("general.name", ""),
		Files:        len(files),
	}
	for _, f := range files {
		out.Bytes += f.Size
	}
	return out
}

// hasLayers is false for files that hold a vocabulary and nothing else.
func hasLayers(files []File) bool {
	for _, f := range files {
		for _, t := range f.Tensors {
			if strings.Contains(t.Name, "blk.") || strings.Contains(t.Name, "attn") {
				return true
			}
		}
	}
	return false
}

// checkAdapter lets through what adds nothing to queries, keys and values. An addition to the
// attention output's projection is computed from the true attention output, so it is sound.
func checkAdapter(files []File) error {
	for _, f := range files {
		for _, t := range f.Tensors {
			base, pair := strings.CutSuffix(t.Name, ".lora_a")
			if !pair {
				base, pair = strings.CutSuffix(t.Name, ".lora_b")
			}
			if !pair {
				return enclave.Refuse("%s: tensor %q does not belong into a LoRA adapter", f.Name, t.Name)
			}
			if touchesRows(base) {
				return enclave.Refuse("%s: the adapter changes %q, whose rows mode permute has permuted; merge the adapter into the model and load that", f.Name, base)
			}
		}
	}
	return nil
}

func touchesRows(name string) bool {
	return strings.Contains(name, "attn") &&
		!strings.Contains(name, ".attn_output.") && !strings.Contains(name, ".attn_norm.")
}
