package shield

import (
	"fmt"
	"slices"
	"strings"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/internal/gguf"
)

// obstacle is a sign of what mode permute cannot do, in whatever architecture: a key without the architecture's name, or the beginning
// of the name of a layer's tensor without "blk.N.".
type obstacle struct{ key, tensor, why string }

const latent = "keys and values are compressed into one row (MLA)"

// obstacles, those first that say most. The keys hold for architectures of the table, too; tensors that it does not know are refused
// as they are met.
var obstacles = []obstacle{
	{key: "attention.kv_lora_rank", why: latent},
	{key: "attention.q_lora_rank", why: latent},
	{key: "attention.key_length_mla", why: latent},
	{key: "attention.value_length_mla", why: latent},
	{key: "rope.dimension_sections", why: "the rotary embedding has a section for each axis of an image (M-RoPE)"},
	{key: "attention.indexer.head_count", why: "an indexer with keys of its own chooses what attention looks at"},
	{key: "hrm.layers_per_stack", why: "layers are used more than once in a graph"},
	{tensor: "indexer", why: "an indexer with keys of its own chooses what attention looks at"},
	{tensor: "vis_attn_", why: "images have attention weights of their own"},
	{tensor: "attn_sub_norm", why: "the attention output is normed before it is projected"},
	{tensor: "attn_q.lora_", why: "adapters that change queries are part of the model"},
	{tensor: "altup_", why: "some layers use the keys and values of another"},
}

// byName are obstacles without a sign in the file.
var byName = map[string]string{
	"minimax-01":    "some layers keep a recurrent state",
	"step35":        "layers with a window rotate another number of rows",
	"deepseek2-ocr": "a context shift turns other pairs of rows than the rotary embedding",
}

// meets says whether an obstacle is in the way.
func (o obstacle) meets(m *metadata, files []File) bool {
	if o.key != "" {
		return m.has(o.key)
	}
	return slices.ContainsFunc(files, func(f File) bool {
		return slices.ContainsFunc(f.Tensors, func(t gguf.Tensor) bool {
			_, rest, ok := cutLayer(t.Name)
			return ok && strings.HasPrefix(rest, o.tensor)
		})
	})
}

// lookUp finds an architecture in the table, or says why it cannot be used, as well as that is known.
func lookUp(m *metadata, files []File) (architecture, error) {
	name := strings.TrimSuffix(m.prefix, ".")
	a, known := architectures[name]
	why := ""
	for _, o := range obstacles {
		if (o.key != "" || !known) && o.meets(m, files) {
			why = fmt.Sprintf(": %s (%q)", o.why, o.key+o.tensor)
			break
		}
	}
	switch named := byName[name]; {
	case why == "" && known:
		return a, nil
	case why == "" && named != "":
		why = ": " + named
	case why == "":
		why = otherwise(m, files)
	}
	return a, enclave.Refuse("architecture %q is not supported by mode permute%s; run it in mode resident, or in mode off without protection", name, why)
}

// otherwise is what stands in the way by its absence, or by a number, where no obstacle is known.
func otherwise(m *metadata, files []File) string {
	switch {
	case m.count("attention.shared_kv_layers", 0) > 0:
		return ": some layers use the keys and values of another"
	case !slices.ContainsFunc(firstNorms, func(name string) bool { return hasTensor(files, "blk.0."+name) }):
		return ": its layers have no norms with weights, by which the hook could tell its graphs"
	case hasTensor(files, "blk.0.attn_k.weight") && !hasTensor(files, "blk.0.attn_v.weight"):
		return ": some layers have no values of their own"
	}
	return ", whose table of architectures does not have it"
}
