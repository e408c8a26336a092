package shield

import (
	"strings"

	"github.com/kvshield/kvshield/enclave"
)

// encoders have attention and no cache: each input is looked at once and nothing of it is kept for the next. An engine that keeps
// a cache for one of them after all is stopped by the hook.
var encoders = map[string]bool{
	"bert": true, "modern-bert": true, "nomic-bert": true, "nomic-bert-moe": true, "neo-bert": true, "jina-bert-v2": true, "jina-bert-v3": true,
	"eurobert": true, "t5encoder": true, "gemma-embedding": true, "gemma-embedding2": true, "llama-embed": true,
	// Diffusion models compute a whole text anew in each step.
	"dream": true, "llada": true, "llada-moe": true, "rnd1": true,
	"wavtokenizer-dec": true, // sounds from codes
}

// recurrent are beginnings of the names of tensors that work on a state which is carried from token to token.
var recurrent = []string{"ssm_", "time_mix_", "channel_mix_", "shortconv."}

// checkState refuses models that remember the conversation elsewhere than in keys and values.
func checkState(files []File) error {
	encodes, decodes := false, false
	for _, f := range files {
		for _, t := range f.Tensors {
			layer, rest, ok := cutLayer(t.Name)
			for _, prefix := range recurrent {
				if ok && strings.HasPrefix(rest, prefix) {
					return enclave.Refuse("layer %d keeps a recurrent state (tensor %q), which holds the conversation as a KV cache does and which no mode can shield; use a model of attention layers only", layer, t.Name)
				}
			}
			encodes = encodes || strings.HasPrefix(t.Name, "enc.blk.")
			decodes = decodes || strings.HasPrefix(t.Name, "dec.blk.")
		}
	}
	if encodes && decodes {
		return enclave.Refuse("this is an encoder-decoder model: the encoder's output holds the conversation outside the KV cache, where no mode can shield it; use a decoder-only model")
	}
	return nil
}

// cacheSize reads how many positions a model was made for and how many floats its layers cache for one. Keys and values may have
// other sizes, and layers other numbers of heads; layers with windows need less. It is for people: 0 where the file does not say.
func cacheSize(f File, architecture string) (context int, floats int64) {
	m := metadata{file: f, prefix: architecture + "."}
	context = m.count("context_length", 0)
	layers, width := int64(m.count("block_count", 0)), int64(m.count("embedding_length", 0))
	heads := m.perLayer("attention.head_count", layers, nil)
	if m.err != nil || len(heads) == 0 || heads[0] == 0 {
		return context, 0
	}
	kv := m.perLayer("attention.head_count_kv", layers, heads)
	each := int64(m.count("attention.key_length", int(width/heads[0]))) + int64(m.count("attention.value_length", int(width/heads[0])))
	for _, n := range kv {
		floats += n * each
	}
	if m.err != nil {
		return context, 0
	}
	return context, floats
}
