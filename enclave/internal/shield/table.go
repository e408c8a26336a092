package shield

import (
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
	HeadNorm // one head's rows, of queries or keys: the norm that is applied to every head before it is rotated
	Sink     // one number for every query head
)

// architecture is everything that shielding has to know about one.
type architecture struct {
	rope Rope
	// weights names the tensors with permuted rows, without "blk.N." and ".weight".
	weights map[string]Role
	// norms names tensors of one head's length, or of none, whose elements are permuted as the rows of queries and keys are. They
	// are optional: not every model of an architecture has them.
	norms []string
	// plain lists other tensors of a layer that the permutation leaves alone; an entry that ends
	// in "_" stands for all names that start with it.
	plain []string
	// factors is the tensor with the frequency factors of all layers; empty when engines have none for it, and the factors go
	// into the graph.
	factors string
	// sinks says that every query head may have an attention sink.
	sinks bool
	// refused lists keys, without the architecture's name, and tensors that stand for another kind
	// of attention.
	refusedKeys    []string
	refusedTensors []string
}

// otherAttention are keys of other kinds of attention than one that is the same in all layers.
var otherAttention = []string{
	"attention.q_lora_rank", "attention.kv_lora_rank",
	"attention.key_length_mla", "attention.value_length_mla",
	"attention.key_length_swa", "attention.value_length_swa",
	"rope.dimension_count_swa", "rope.freq_base_swa", "rope.dimension_sections",
}

// likeLlama has separate queries, keys and values, and frequency factors of its own in a tensor that the engine looks for.
func likeLlama(rope Rope, norms ...string) architecture {
	return architecture{
		rope:           rope,
		weights:        map[string]Role{"attn_q": Query, "attn_k": Key, "attn_v": Value},
		norms:          norms,
		plain:          []string{"attn_norm", "attn_output", "ffn_", "post_attention_norm", "post_ffw_norm", "exp_probs_b"},
		factors:        "rope_freqs.weight",
		refusedKeys:    otherAttention,
		refusedTensors: []string{"rope_factors_long.weight", "rope_factors_short.weight"},
	}
}

// inGraph has no frequency factors of its own: the hook gives them to the graph.
func inGraph(rope Rope, norms ...string) architecture {
	a := likeLlama(rope, norms...)
	a.factors = ""
	a.refusedTensors = append(a.refusedTensors, "rope_freqs.weight")
	return a
}

// withSinks has an attention sink for every query head.
func withSinks(a architecture) architecture {
	a.sinks = true
	return a
}

// architectures that mode permute knows: a new one is an entry here. The layout of the rotary embedding is what the engine prints
// as "rope type" when it loads a model (0: norm, 2: neox). Not possible with one permutation of heads: ALiBi (mpt, bloom), which
// gives every head its own slope; the hook stops a graph that has it.
var architectures = map[string]architecture{
	"llama":          likeLlama(RopeNorm),
	"llama4":         likeLlama(RopeNorm),
	"mistral3":       likeLlama(RopeNorm),
	"minicpm":        likeLlama(RopeNorm),
	"granite":        likeLlama(RopeNorm),
	"granitemoe":     likeLlama(RopeNorm),
	"arcee":          likeLlama(RopeNorm),
	"nanbeige":       likeLlama(RopeNorm),
	"exaone":         likeLlama(RopeNeox),
	"exaone4":        likeLlama(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"exaone-moe":     likeLlama(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"apertus":        likeLlama(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"internlm2":      inGraph(RopeNorm),
	"xverse":         inGraph(RopeNorm),
	"command-r":      inGraph(RopeNorm),
	"cohere2":        inGraph(RopeNorm),
	"cohere2moe":     inGraph(RopeNorm),
	"arctic":         inGraph(RopeNorm),
	"deepseek":       inGraph(RopeNorm),
	"chatglm":        inGraph(RopeNorm),
	"glm4":           inGraph(RopeNorm),
	"bailingmoe":     inGraph(RopeNorm),
	"ernie4_5":       inGraph(RopeNorm),
	"ernie4_5-moe":   inGraph(RopeNorm),
	"smollm3":        inGraph(RopeNorm),
	"falcon":         inGraph(RopeNeox),
	"gptneox":        inGraph(RopeNeox),
	"stablelm":       inGraph(RopeNeox),
	"qwen":           inGraph(RopeNeox),
	"qwen2":          inGraph(RopeNeox),
	"qwen2moe":       inGraph(RopeNeox),
	"phi2":           inGraph(RopeNeox),
	"phi3":           inGraph(RopeNeox),
	"phimoe":         inGraph(RopeNeox),
	"plamo":          inGraph(RopeNeox),
	"codeshell":      inGraph(RopeNeox),
	"orion":          inGraph(RopeNeox),
	"gemma":          inGraph(RopeNeox),
	"gemma2":         inGraph(RopeNeox),
	"starcoder2":     inGraph(RopeNeox),
	"glm4moe":        inGraph(RopeNeox),
	"jais2":          inGraph(RopeNeox),
	"nemotron":       inGraph(RopeNeox),
	"smallthinker":   inGraph(RopeNeox),
	"seed_oss":       inGraph(RopeNeox),
	"pangu-embedded": inGraph(RopeNeox),
	"k2-horizon":     inGraph(RopeNeox),
	"gpt2":           inGraph(RopeNone),
	"starcoder":      inGraph(RopeNone),
	"qwen3":          inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"qwen3moe":       inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"olmo2":          inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"olmoe":          inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"dots1":          inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"hunyuan-moe":    inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"hunyuan-dense":  inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"hy_v3":          inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"bailingmoe2":    inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"grovemoe":       inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"maple":          inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"mellum":         inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"minimax-m2":     inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"plamo3":         inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"openelm":        inGraph(RopeNeox, "attn_q_norm", "attn_k_norm"),
	"maincoder":      inGraph(RopeNorm, "attn_q_norm", "attn_k_norm"),
	"gpt-oss":        withSinks(inGraph(RopeNeox)),
}

func lookUp(name string) (architecture, error) {
	a, ok := architectures[name]
	if !ok {
		return a, enclave.Refuse("architecture %q is not supported by mode permute; run it in mode resident, or in mode off without protection", name)
	}
	return a, nil
}

func (a architecture) leavesAlone(base string) bool {
	return slices.ContainsFunc(a.plain, func(p string) bool {
		return base == p || strings.HasSuffix(p, "_") && strings.HasPrefix(base, p)
	})
}
