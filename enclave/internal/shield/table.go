package shield

import (
	"maps"
	"slices"
	"strings"

	"github.com/kvshield/kvshield/enclave"
)

// Role is what the rows of a tensor are.
type Role int

// The roles of permuted rows.
const (
	Query Role = iota + 1
	Key
	Value
)

// architecture is everything that shielding has to know about one.
type architecture struct {
	rope Rope
	// weights names the tensors with permuted rows, without "blk.N." and ".weight".
	weights map[string]Role
	// plain lists other tensors of a layer that the permutation leaves alone; an entry that ends
	// in "_" stands for all names that start with it.
	plain []string
	// factors is the tensor with the frequency factors of all layers.
	factors string
	// refused lists keys, without the architecture's name, and tensors that stand for another kind
	// of attention.
	refusedKeys    []string
	refusedTensors []string
}

var architectures = map[string]architecture{
	"llama": {
		rope:    RopeNorm,
		weights: map[string]Role{"attn_q": Query, "attn_k": Key, "attn_v": Value},
		plain:   []string{"attn_norm", "attn_output", "ffn_"},
		factors: "rope_freqs.weight",
		refusedKeys: []string{
			"attention.q_lora_rank", "attention.kv_lora_rank",
			"attention.key_length_mla", "attention.value_length_mla",
			"attention.key_length_swa", "attention.value_length_swa",
			"rope.dimension_count_swa", "rope.freq_base_swa", "rope.dimension_sections",
		},
		refusedTensors: []string{"rope_factors_long.weight", "rope_factors_short.weight"},
	},
}

func lookUp(name string) (architecture, error) {
	a, ok := architectures[name]
	if !ok {
		return a, enclave.Refuse("architecture %q is not supported by mode permute (supported: %s); run it with a supported model, or in mode off without protection",
			name, strings.Join(slices.Sorted(maps.Keys(architectures)), ", "))
	}
	return a, nil
}

func (a architecture) leavesAlone(base string) bool {
	return slices.ContainsFunc(a.plain, func(p string) bool {
		return base == p || strings.HasSuffix(p, "_") && strings.HasPrefix(base, p)
	})
}
