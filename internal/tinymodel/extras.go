package tinymodel

import (
	"fmt"
	"maps"
	"regexp"
	"strings"
)

// Shape of the tiny models, unless extras say otherwise.
const (
	layers  = 4
	width   = 128
	heads   = 4
	headsKV = 2
	inner   = 192
	window  = 32
)

// defaults are values for keys of metadata that an engine asks for.
var defaults = map[string]any{
	"attention.layer_norm_rms_epsilon":       float32(1e-6),
	"attention.layer_norm_epsilon":           float32(1e-5),
	"attention.group_norm_epsilon":           float32(1e-5),
	"attention.group_norm_groups":            uint32(4),
	"attention.sliding_window":               uint32(window),
	"attention.sliding_window_pattern":       uint32(2),
	"attention.key_length":                   uint32(32),
	"attention.value_length":                 uint32(32),
	"attention.key_length_swa":               uint32(32),
	"attention.value_length_swa":             uint32(32),
	"attention.key_length_mla":               uint32(48),
	"attention.value_length_mla":             uint32(32),
	"attention.q_lora_rank":                  uint32(48),
	"attention.kv_lora_rank":                 uint32(64),
	"attention.decay_lora_rank":              uint32(16),
	"attention.iclr_lora_rank":               uint32(16),
	"attention.value_residual_mix_lora_rank": uint32(16),
	"attention.gate_lora_rank":               uint32(16),
	"attention.output_lora_rank":             uint32(32),
	"attention.output_group_count":           uint32(2),
	"attention.relative_buckets_count":       uint32(8),
	"attention.max_alibi_bias":               float32(8),
	"attention.clamp_kqv":                    float32(4),
	"attention.scale":                        float32(0.2),
	"attention.output_scale":                 float32(1),
	"attention.temperature_length":           uint32(64),
	"attention.temperature_scale":            float32(0.1),
	"attention.causal":                       true,
	"attention.shared_kv_layers":             uint32(0),
	"attention.indexer.head_count":           uint32(2),
	"attention.indexer.key_length":           uint32(32),
	"attention.indexer.top_k":                uint32(16),
	"attention.head_count_kv":                uint32(headsKV),
	"attention.head_count":                   uint32(heads),
	"attn_logit_softcapping":                 float32(5),
	"router_logit_softcapping":               float32(5),
	"final_logit_softcapping":                float32(30),
	"embedding_scale":                        float32(1),
	"residual_scale":                         float32(1),
	"logit_scale":                            float32(1),
	"embedding_length_per_layer_input":       uint32(16),
	"embedding_length_out":                   uint32(width),
	"features_length":                        uint32(width),
	"feed_forward_length":                    uint32(inner),
	"vocab_size":                             uint32(Vocabulary),
	"expert_count":                           uint32(4),
	"expert_used_count":                      uint32(4),
	"expert_group_count":                     uint32(2),
	"expert_group_used_count":                uint32(1),
	"expert_feed_forward_length":             uint32(64),
	"expert_chunk_feed_forward_length":       uint32(64),
	"expert_shared_feed_forward_length":      uint32(64),
	"expert_shared_count":                    uint32(1),
	"expert_weights_scale":                   float32(1),
	"expert_weights_norm":                    true,
	"expert_gating_func":                     uint32(1),
	"expert_group_scale":                     float32(1),
	"experts_per_group":                      uint32(2),
	"expert_latent_length":                   uint32(64),
	"moe_every_n_layers":                     uint32(1),
	"moe_latent_size":                        uint32(64),
	"interleave_moe_layer_step":              uint32(2),
	"leading_dense_block_count":              uint32(1),
	"use_parallel_residual":                  true,
	"pooling_type":                           uint32(1),
	"rope.dimension_count":                   uint32(32),
	"rope.dimension_count_swa":               uint32(32),
	"rope.dimension_sections":                []uint32{4, 6, 6, 0},
	"rope.freq_base":                         float32(10000),
	"rope.freq_base_swa":                     float32(1000),
	"rope.scaling.factor":                    float32(1),
	"rope.scaling.original_context_length":   uint32(2048),
	"rope.scaling.attn_factor":               float32(1),
	"rope.scaling.alpha":                     float32(1),
	"ssm.conv_kernel":                        uint32(4),
	"ssm.inner_size":                         uint32(2 * width),
	"ssm.state_size":                         uint32(16),
	"ssm.time_step_rank":                     uint32(8),
	"ssm.group_count":                        uint32(2),
	"ssm.dt_b_c_rms":                         false,
	"kda.head_dim":                           uint32(32),
	"wkv.head_size":                          uint32(32),
	"token_shift_count":                      uint32(2),
	"time_mix_extra_dim":                     uint32(16),
	"time_decay_extra_dim":                   uint32(16),
	"rescale_every_n_layers":                 uint32(0),
	"shortconv.l_cache":                      uint32(3),
	"full_attention_interval":                uint32(2),
	"n_deepstack_layers":                     uint32(0),
	"nextn_predict_layers":                   uint32(0),
	"swin_norm":                              false,
	"posnet.embedding_length":                uint32(width),
	"posnet.block_count":                     uint32(layers),
	"convnext.embedding_length":              uint32(width),
	"convnext.block_count":                   uint32(layers),
	"xielu.alpha_n":                          []float32{1},
	"xielu.alpha_p":                          []float32{1},
	"xielu.beta":                             []float32{0.5},
	"xielu.eps":                              []float32{1e-6},
	"activation_sparsity_scale":              []float32{0},
	"altup.active_idx":                       uint32(0),
	"altup.num_inputs":                       uint32(4),
	"hidden_activation":                      "silu",
	"block_count":                            uint32(layers),
	"decoder_block_count":                    uint32(layers),
	"decoder_start_token_id":                 uint32(1),
	"decision.head_count":                    uint32(2),
	"hyper_connection.magnitude":             float32(1),
	"activation.situ_linear_beta":            float32(1),
	"hash_layer_count":                       uint32(1),
	"tokenizer.ggml.token_type_count":        uint32(2),
	"extract_layers":                         []uint32{0, 1, 2},
	"target_layers":                          []uint32{0, 1, 2},
	"target_hidden_size":                     uint32(width),
	"decision.block_count":                   uint32(1),
	"hyper_connection.low_rank":              uint32(16),
	"hyper_connection.epsilon":               float32(1e-6),
	"hyper_connection.sinkhorn_iterations":   uint32(3),
	"attention.compress_rope_freq_base":      float32(10000),
	"adapters.lora_rank":                     uint32(8),
	"attention.key_length_mla_swa":           uint32(48),
	"attention.value_length_mla_swa":         uint32(32),
	"activation.situ_beta":                   float32(1),
	"attention.indexer.local_blocks":         uint32(1),
	"hrm.h_cycles":                           uint32(1),
	"hrm.l_cycles":                           uint32(1),
	"hyper_connection.count":                 uint32(4),
	"kda.gate_lower_bound":                   float32(-5),
	"attention.kv_lora_rank_swa":             uint32(64),
	"swiglu_clamp_exp":                       float32(7),
	"decision.routing_block_count":           uint32(1),
	"adapters.count":                         uint32(1),
	"attn_res.block_size":                    uint32(2),
	"attention.indexer.kpool":                uint32(2),
	"attention.indexer.block_size":           uint32(16),
	"hrm.layers_per_stack":                   uint32(2),
	"diffusion.shift_logits":                 true,
}

// hints are complaints that name no key, and the keys that they mean.
var hints = []struct {
	says *regexp.Regexp
	keys []string
}{
	{regexp.MustCompile(`n_expert|zero experts|expert count|(exps|gate_inp|exp_probs_b)[^']*' has wrong shape; expected[ \d,]* 0,`),
		[]string{"expert_count", "expert_used_count", "expert_feed_forward_length", "moe_every_n_layers", "moe_latent_size"}},
	{regexp.MustCompile(`shexp[^']*' has wrong shape; expected[ \d,]* 0,`), []string{"expert_shared_count", "expert_shared_feed_forward_length"}},
	{regexp.MustCompile(`exps[^']*' has wrong shape; expected[ \d,]* 0,`), []string{"expert_feed_forward_length"}},
	{regexp.MustCompile(`token type count|token_types`), []string{"tokenizer.ggml.token_type_count"}},
	{regexp.MustCompile(`Cohere2 MoE norm epsilon`), []string{"attention.layer_norm_epsilon"}},
	{regexp.MustCompile(`embedding_length_out`), []string{"embedding_length_out"}},
	{regexp.MustCompile(`time_mix_g1`), []string{"attention.gate_lora_rank"}},
	{regexp.MustCompile(`positive sliding window`), []string{"attention.sliding_window", "attention.sliding_window_pattern"}},
	{regexp.MustCompile(`extract_layers`), []string{"extract_layers", "target_hidden_size"}},
	{regexp.MustCompile(`target_layers`), []string{"target_layers"}},
}

// extra is what an architecture's model has beyond what the engine asks for.
type extra struct {
	keys map[string]any
	// perLayer are optional tensors of every layer, without "blk.N.".
	perLayer map[string][]int64
	global   map[string][]int64
}

var qkvBias = map[string][]int64{"attn_q.bias": {width}, "attn_k.bias": {headsKV * 32}, "attn_v.bias": {headsKV * 32}}

func kv(pairs ...any) extra {
	x := extra{keys: map[string]any{}}
	for i := 0; i < len(pairs); i += 2 {
		x.keys[pairs[i].(string)] = pairs[i+1]
	}
	return x
}

const (
	headCountKV = "attention.head_count_kv"
	rotated     = "rope.dimension_count"
)

// experts are keys that some engines ask for by their consequences only.
var experts = []any{"expert_count", uint32(4), "expert_used_count", uint32(4), "expert_feed_forward_length", uint32(64)}

// extras is where optional parts of an architecture are listed.
var extras = map[string]extra{
	"afmoe":            kv("attention.sliding_window", uint32(window)),
	"laguna":           {perLayer: map[string][]int64{"attn_gate.weight": {width, heads}}},
	"pockettts":        {perLayer: map[string][]int64{"attn_qkv.weight": {width, width + 2*headsKV*32}}},
	"jina-bert-v2":     {keys: map[string]any{"tokenizer.ggml.token_type_count": uint32(2)}, perLayer: map[string][]int64{"ffn_up.weight": {width, inner}}},
	"maion-coder":      kv("attention.sliding_window", uint32(window), "attention.sliding_window_pattern", alternating(layers)),
	"graniteswitch":    kv("adapters.token_ids_activate", []int32{5}, "adapters.token_ids_substitute", []int32{6}),
	"qwen35moe":        kv(experts...),
	"qwen4exp":         kv(experts...),
	"llama":            {global: map[string][]int64{"rope_freqs.weight": {16}}},
	"qwen":             kv(headCountKV, uint32(heads)),
	"qwen2":            {perLayer: qkvBias},
	"qwen2moe":         {perLayer: qkvBias},
	"qwen2vl":          {perLayer: qkvBias},
	"gemma":            kv("attention.key_length", uint32(256), "attention.value_length", uint32(256), headCountKV, uint32(1)),
	"gemma2":           kv("attn_logit_softcapping", float32(2), "final_logit_softcapping", float32(30), "attention.key_length", uint32(48), "attention.value_length", uint32(48)),
	"gemma3n":          kv("block_count", uint32(22), "attention.shared_kv_layers", uint32(2)),
	"gptneox":          kv(headCountKV, uint32(heads), rotated, uint32(8)),
	"gpt2":             kv(headCountKV, uint32(heads)),
	"phi2":             kv(headCountKV, uint32(heads), rotated, uint32(16)),
	"mpt":              kv(headCountKV, uint32(heads), "attention.max_alibi_bias", float32(8)),
	"bloom":            kv(headCountKV, uint32(heads)),
	"starcoder":        kv(headCountKV, uint32(1)),
	"falcon":           kv(headCountKV, uint32(1)),
	"stablelm":         kv(rotated, uint32(8)),
	"olmoe":            kv(headCountKV, uint32(heads)),
	"dots1":            kv(headCountKV, uint32(heads), "expert_gating_func", uint32(2)),
	"t5":               kv(headCountKV, uint32(heads), "attention.key_length", uint32(32), "attention.value_length", uint32(32)),
	"t5encoder":        {keys: map[string]any{headCountKV: uint32(heads), "attention.key_length": uint32(32), "attention.value_length": uint32(32)}, global: map[string][]int64{"enc.blk.0.attn_rel_b.weight": {heads, 8}}},
	"gemma-embedding":  kv("attention.sliding_window", uint32(window), "block_count", uint32(7)),
	"gemma-embedding2": kv("attention.sliding_window", uint32(window), "attention.sliding_window_pattern", alternating(layers)),
	"minimax-m2":       kv("expert_gating_func", uint32(2)),
	"smallthinker":     kv("expert_gating_func", uint32(2)),
	"paddleocr":        kv("rope.dimension_sections", []int32{4, 6, 6, 0}),
	"hunyuan_vl":       kv("rope.dimension_sections", []int32{4, 6, 6, 0}),
	"rwkv6qwen2":       kv("token_shift_count", uint32(1)),
	"arwkv7":           kv("token_shift_count", uint32(1)),
	"gemma3":           kv("block_count", uint32(7), "attention.sliding_window", uint32(window), "rope.freq_base", float32(1e6)),
	"openelm":          kv("attention.head_count", []uint32{2, 4, 4, 8}, headCountKV, []uint32{1, 2, 4, 4}, "attention.key_length", uint32(32), "attention.value_length", uint32(32)),
	"phi3": {perLayer: map[string][]int64{"attn_qkv.weight": {width, width + 2*headsKV*32}},
		global: map[string][]int64{"rope_factors_long.weight": {16}, "rope_factors_short.weight": {16}},
		keys:   map[string]any{"rope.scaling.original_context_length": uint32(512)}},
}

// variants are other shapes of an architecture's model: what is behind the colon of a name such as "qwen3:head80".
var variants = map[string]map[string]any{
	"head64":  headsOf(64),
	"head80":  headsOf(80),
	"head96":  headsOf(96),
	"head128": headsOf(128),
	"head256": headsOf(256),
	"mqa":     {headCountKV: uint32(1)},
	"mha":     {headCountKV: uint32(heads)},
	"moe":     {"expert_count": uint32(4), "expert_used_count": uint32(4), "expert_feed_forward_length": uint32(64)},
	"yarn":    {"rope.scaling.type": "yarn", "rope.scaling.factor": float32(4), "rope.scaling.original_context_length": uint32(64)},
	// wide has rows that K-quants can store.
	"wide": {"embedding_length": uint32(256), "feed_forward_length": uint32(512), "attention.key_length": uint32(64), "attention.value_length": uint32(64)},
}

func headsOf(n uint32) map[string]any {
	return map[string]any{"attention.key_length": n, "attention.value_length": n, "rope.dimension_count": n}
}

// latent is attention with keys and values compressed into one row (MLA).
var latent = map[string]any{"attention.key_length": uint32(64 + 16), "attention.value_length": uint32(64), "attention.key_length_mla": uint32(48),
	"attention.value_length_mla": uint32(32), "attention.kv_lora_rank": uint32(64), "attention.q_lora_rank": uint32(48),
	"rope.dimension_count": uint32(16), "attention.head_count_kv": uint32(1), "expert_count": uint32(4), "expert_used_count": uint32(4),
	"leading_dense_block_count": uint32(1)}

// latentWith is MLA with more, or other, keys.
func latentWith(pairs ...any) extra {
	x := extra{keys: maps.Clone(latent)}
	maps.Copy(x.keys, kv(pairs...).keys)
	return x
}

const (
	sigmoid      = 2 // how experts are chosen
	sqrtSoftplus = 4
	// indexed is the length of an indexer's keys. Engines turn them by a Hadamard matrix, for which 32 is too short.
	indexed = 64
)

func init() {
	for _, name := range []string{"deepseek2", "mistral4"} {
		extras[name] = extra{keys: latent}
	}
	// MLA whose projections are not absorbed caches keys and values for every head.
	for _, name := range []string{"minicpm3", "plm"} {
		extras[name] = kv("attention.key_length", uint32(48), "attention.value_length", uint32(32), rotated, uint32(16), headCountKV, uint32(heads))
	}
	extras["deepseek2-ocr"] = kv(headCountKV, uint32(heads), "attention.key_length", uint32(32), "attention.value_length", uint32(32), rotated, uint32(32))
	extras["grovemoe"] = kv("expert_used_count", uint32(2), "experts_per_group", uint32(2))
	sparse()
	hybrid()
}

// sparse are architectures with MLA, of which most choose the cells that they look at by an indexer.
func sparse() {
	gate, indexer := []any{"expert_gating_func", uint32(sigmoid)}, []any{"attention.indexer.key_length", uint32(indexed)}
	extras["hy_v4"] = latentWith(gate...)
	extras["deepseek32"] = latentWith(append(gate, indexer...)...)
	extras["glm-dsa"] = latentWith(append(gate, indexer...)...)
	extras["dots3note"] = latentWith(append(append(gate, indexer...), "attention.indexer.types", []bool{true, true, true, true},
		"attention.key_length", uint32(64), "attention.value_length", uint32(48), "attention.kv_lora_rank", uint32(48),
		"attention.key_length_swa", uint32(64), "attention.value_length_swa", uint32(48), "attention.kv_lora_rank_swa", uint32(48),
		"rope.dimension_count_swa", uint32(16))...)
	extras["deepseek4"] = kv("attention.compress_ratios", []uint32{0, 4, 128, 4}, "expert_gating_func", uint32(sqrtSoftplus), headCountKV, uint32(1))
	x := extras["glm-dsa"]
	x.perLayer = map[string][]int64{"indexer.k_norm.weight": {indexed}, "indexer.k_norm.bias": {indexed}, "indexer.proj.weight": {width, 2},
		"indexer.attn_k.weight": {width, indexed}, "indexer.attn_q_b.weight": {48, 2 * indexed}}
	extras["glm-dsa"] = x
}

// hybrid are architectures whose layers without heads for keys and values are recurrent.
func hybrid() {
	for _, name := range []string{"granitehybrid", "lfm2", "lfm2moe", "minimax-01", "plamo2", "jamba"} {
		extras[name] = kv(headCountKV, []uint32{0, headsKV, 0, headsKV})
	}
	extras["plamo2"].keys["ssm.group_count"] = uint32(0)
	for _, name := range []string{"nemotron_h", "nemotron_h_moe"} { // those without a feed-forward either, that is
		extras[name] = kv(headCountKV, []uint32{0, headsKV, 0, 0}, "feed_forward_length", []uint32{0, 0, inner, inner})
	}
	for _, name := range []string{"kimi-linear", "kimi-k3", "bailingmoe3"} {
		extras[name] = latentWith(headCountKV, []uint32{0, 1, 0, 1})
	}
	extras["glm5-next"] = latentWith(headCountKV, []uint32{0, 1, 0, 1}, rotated, uint32(0), "attention.key_length", uint32(64))
}

// Start is the beginning of a recipe: what every model has, and the extras of its architecture. A name may have a variant behind a
// colon; the recipe has no optional tensors then, whose shapes are those of the plain model.
func Start(name string) Recipe {
	architecture, variant, varied := strings.Cut(name, ":")
	r := Recipe{Architecture: architecture, Keys: map[string]any{}}
	r.set("context_length", uint32(2048))
	r.set("embedding_length", uint32(width))
	for _, key := range []string{"block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv"} {
		r.set(key, defaults[key])
	}
	x := extras[architecture]
	for _, key := range sortedKeys(x.keys) {
		r.set(key, x.keys[key])
	}
	for _, key := range sortedKeys(variants[variant]) {
		r.set(key, variants[variant][key])
	}
	if varied {
		return r
	}
	for _, name := range sortedKeys(x.global) {
		r.Tensors = append(r.Tensors, Tensor{name, x.global[name]})
	}
	for i := range r.Keys["block_count"].(uint32) {
		for _, name := range sortedKeys(x.perLayer) {
			r.Tensors = append(r.Tensors, Tensor{fmt.Sprintf("blk.%d.%s", i, name), x.perLayer[name]})
		}
	}
	return r
}
