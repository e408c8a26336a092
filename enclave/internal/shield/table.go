package shield

import (
	"slices"
	"strings"
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
	Gate     // the rows of all query heads that the attention output is multiplied with, number by number
	HeadGate // one row for every query head, for all of its numbers
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
	// gated says that the attention output is multiplied with what attn_gate makes, before it is projected.
	gated bool
	// fixedHeads is for attention with a bias that differs from head to head (ALiBi).
	fixedHeads bool
}

// ownFactors are tensors with a model's own frequency factors.
var ownFactors = []string{"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}

// headNorms are norms that many architectures have for every head, or for all heads together.
var headNorms = []string{"attn_q_norm", "attn_k_norm"}

// likeLlama has separate queries, keys and values, and frequency factors of its own in a tensor that the engine looks for.
func likeLlama(rope Rope, norms ...string) architecture {
	return architecture{
		rope:    rope,
		weights: map[string]Role{"attn_q": Query, "attn_k": Key, "attn_v": Value},
		norms:   norms,
		plain:   []string{"attn_norm", "attn_norm_2", "attn_output", "attn_output_norm", "ffn_", "layer_output_norm", "post_attention_norm", "post_ffw_norm", "exp_probs_b"},
		factors: "rope_freqs.weight",
	}
}

// inGraph has no place for frequency factors in its file: the hook gives them to the graph.
func inGraph(rope Rope, norms ...string) architecture {
	a := likeLlama(rope, norms...)
	a.factors = ""
	return a
}

// withSinks has an attention sink for every query head.
func withSinks(a architecture) architecture {
	a.sinks = true
	return a
}

// withGate may have a gate behind attention.
func withGate(a architecture) architecture {
	a.gated = true
	return a
}

// withALiBi gives every head a slope of its own: heads stay where they are.
func withALiBi(a architecture) architecture {
	a.fixedHeads = true
	return a
}

// architectures that mode permute knows: a new one is an entry here. The layout of the rotary embedding is what the engine prints
// as "rope type" when it loads a model (0: norm, 2: neox). The hook stops a graph with ALiBi of an entry that is not withALiBi.
var architectures = map[string]architecture{
	"llama":          likeLlama(RopeNorm),
	"llama4":         likeLlama(RopeNorm),
	"mistral3":       likeLlama(RopeNorm),
	"minicpm":        likeLlama(RopeNorm),
	"granite":        likeLlama(RopeNorm),
	"granitemoe":     likeLlama(RopeNorm),
	"arcee":          likeLlama(RopeNorm),
	"nanbeige":       likeLlama(RopeNorm),
	"deci":           likeLlama(RopeNorm),
	"exaone":         likeLlama(RopeNeox),
	"exaone4":        likeLlama(RopeNeox, headNorms...),
	"exaone-moe":     likeLlama(RopeNeox, headNorms...),
	"apertus":        likeLlama(RopeNeox, headNorms...),
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
	"pockettts":      inGraph(RopeNorm),
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
	"qwen3":          inGraph(RopeNeox, headNorms...),
	"qwen3moe":       inGraph(RopeNeox, headNorms...),
	"olmo2":          inGraph(RopeNeox, headNorms...),
	"olmoe":          inGraph(RopeNeox, headNorms...),
	"dots1":          inGraph(RopeNeox, headNorms...),
	"hunyuan-moe":    inGraph(RopeNeox, headNorms...),
	"hunyuan-dense":  inGraph(RopeNeox, headNorms...),
	"hy_v3":          inGraph(RopeNeox, headNorms...),
	"bailingmoe2":    inGraph(RopeNeox, headNorms...),
	"grovemoe":       inGraph(RopeNeox, headNorms...),
	"maple":          inGraph(RopeNeox, headNorms...),
	"mellum":         inGraph(RopeNeox, headNorms...),
	"minimax-m2":     inGraph(RopeNeox, headNorms...),
	"plamo3":         inGraph(RopeNeox, headNorms...),
	"openelm":        inGraph(RopeNeox, headNorms...),
	"maincoder":      inGraph(RopeNorm, headNorms...),
	"maion-coder":    inGraph(RopeNeox, headNorms...),
	"gpt-oss":        withSinks(inGraph(RopeNeox)),
	"mimo2":          withSinks(inGraph(RopeNeox)),
	"muse-glimmer":   withGate(inGraph(RopeNorm, headNorms...)),
	"afmoe":          withGate(inGraph(RopeNeox, headNorms...)),
	"laguna":         withGate(inGraph(RopeNeox, headNorms...)),
	"spark2_5":       withGate(inGraph(RopeNeox)),
	"gemma3":         inGraph(RopeNeox, headNorms...),
	"dbrx":           inGraph(RopeNeox),
	"grok":           inGraph(RopeNeox),
	"granite_swa":    withSinks(inGraph(RopeNorm)),
	"baichuan":       withALiBi(inGraph(RopeNorm)),
	"mpt":            withALiBi(inGraph(RopeNone, headNorms...)),
	"bloom":          withALiBi(inGraph(RopeNone)),
	"refact":         withALiBi(inGraph(RopeNone)),
	"jais":           withALiBi(inGraph(RopeNone)),
}

func (a architecture) leavesAlone(base string) bool {
	return slices.ContainsFunc(a.plain, func(p string) bool {
		return base == p || strings.HasSuffix(p, "_") && strings.HasPrefix(base, p)
	})
}
