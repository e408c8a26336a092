package e2e

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/kvshield/kvshield/internal/gguf"
)

// random writes a model of random weights.
type random struct {
	gguf.Builder
	arch string
}

func (r *random) key(name string, value any) { r.Key(r.arch+"."+name, value) }

func (r *random) tensor(name string, scale float64, offset float32, dims ...int64) {
	count := int64(1)
	for _, d := range dims {
		count *= d
	}
	r.Tensor(name, gguf.F32, dims, func(w io.Writer) error {
		h := fnv.New64a()
		h.Write([]byte(name))
		numbers := rand.New(rand.NewPCG(1, h.Sum64()))
		b := make([]byte, 0, 4*count)
		for range count {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(offset+float32(scale*numbers.NormFloat64())))
		}
		_, err := w.Write(b)
		return err
	})
}

func (r *random) matrix(name string, columns, rows int64) {
	r.tensor(name, 1/math.Sqrt(float64(columns)), 0, columns, rows)
}
func (r *random) norm(name string, n int64, bias bool) {
	r.tensor(name+".weight", 0.1, 1, n)
	if bias {
		r.tensor(name+".bias", 0.1, 0, n)
	}
}

// words gives the model a vocabulary in which every text falls to bytes.
func (r *random) words() {
	pieces, types := []string{"<unk>", "<s>", "</s>"}, []int32{2, 3, 3}
	for i := range 256 {
		pieces, types = append(pieces, fmt.Sprintf("<0x%02X>", i)), append(types, 6)
	}
	for len(pieces) < vocabulary {
		pieces, types = append(pieces, fmt.Sprintf("w%d", len(pieces))), append(types, 1)
	}
	r.Key("tokenizer.ggml.model", "llama")
	r.Key("tokenizer.ggml.tokens", pieces)
	r.Key("tokenizer.ggml.scores", make([]float32, len(pieces)))
	r.Key("tokenizer.ggml.token_type", types)
	r.Key("tokenizer.ggml.bos_token_id", uint32(1))
	r.Key("tokenizer.ggml.eos_token_id", uint32(2))
}

// Shape of the random models.
const (
	randomLayers  = 4
	randomWidth   = 128
	randomHeads   = 4
	randomHeadsKV = 2
	randomFFN     = 256
)

func newRandom(arch string, headsKV uint32) *random {
	r := &random{arch: arch}
	r.Key("general.architecture", arch)
	for name, n := range map[string]uint32{"block_count": randomLayers, "context_length": 2048, "embedding_length": randomWidth,
		"feed_forward_length": randomFFN, "attention.head_count": randomHeads, "attention.head_count_kv": headsKV} {
		r.key(name, n)
	}
	r.words()
	r.matrix("token_embd.weight", randomWidth, vocabulary)
	return r
}

// gemma2: sliding windows in every other layer, soft-capped logits, norms behind attention.
func gemma2() *random {
	r := newRandom("gemma2", randomHeadsKV)
	r.key("attention.layer_norm_rms_epsilon", float32(1e-6))
	r.key("attention.key_length", uint32(48))
	r.key("attention.value_length", uint32(48))
	r.key("attention.sliding_window", uint32(32))
	r.key("attn_logit_softcapping", float32(2))
	r.key("final_logit_softcapping", float32(30))
	for i := range randomLayers {
		p := fmt.Sprintf("blk.%d.", i)
		r.matrix(p+"attn_q.weight", randomWidth, randomHeads*48)
		r.matrix(p+"attn_k.weight", randomWidth, randomHeadsKV*48)
		r.matrix(p+"attn_v.weight", randomWidth, randomHeadsKV*48)
		r.matrix(p+"attn_output.weight", randomHeads*48, randomWidth)
		for _, name := range []string{"attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"} {
			r.norm(p+name, randomWidth, false)
		}
		r.matrix(p+"ffn_gate.weight", randomWidth, randomFFN)
		r.matrix(p+"ffn_up.weight", randomWidth, randomFFN)
		r.matrix(p+"ffn_down.weight", randomFFN, randomWidth)
	}
	r.norm("output_norm", randomWidth, false)
	return r
}

// mpt: ALiBi instead of a rotary embedding, queries, keys and values from one matrix.
func mpt() *random {
	r := newRandom("mpt", randomHeads)
	r.key("attention.layer_norm_epsilon", float32(1e-5))
	r.key("attention.max_alibi_bias", float32(8))
	for i := range randomLayers {
		p := fmt.Sprintf("blk.%d.", i)
		r.matrix(p+"attn_qkv.weight", randomWidth, 3*randomWidth)
		r.matrix(p+"attn_output.weight", randomWidth, randomWidth)
		r.norm(p+"attn_norm", randomWidth, true)
		r.norm(p+"ffn_norm", randomWidth, true)
		r.matrix(p+"ffn_up.weight", randomWidth, randomFFN)
		r.matrix(p+"ffn_down.weight", randomFFN, randomWidth)
	}
	r.norm("output_norm", randomWidth, true)
	return r
}

// gptOSS: attention sinks, biases, sliding windows, experts.
func gptOSS() *random {
	const experts = 4
	r := newRandom("gpt-oss", randomHeadsKV)
	r.key("attention.layer_norm_rms_epsilon", float32(1e-5))
	r.key("attention.sliding_window", uint32(32))
	r.key("attention.key_length", uint32(32))
	r.key("attention.value_length", uint32(32))
	r.key("expert_count", uint32(experts))
	r.key("expert_used_count", uint32(2))
	r.key("expert_feed_forward_length", uint32(randomFFN))
	linear := func(name string, columns, rows int64) {
		r.matrix(name+".weight", columns, rows)
		r.tensor(name+".bias", 0.1, 0, rows)
	}
	for i := range randomLayers {
		p := fmt.Sprintf("blk.%d.", i)
		linear(p+"attn_q", randomWidth, randomHeads*32)
		linear(p+"attn_k", randomWidth, randomHeadsKV*32)
		linear(p+"attn_v", randomWidth, randomHeadsKV*32)
		linear(p+"attn_output", randomHeads*32, randomWidth)
		r.tensor(p+"attn_sinks.weight", 1, 1, randomHeads)
		r.norm(p+"attn_norm", randomWidth, false)
		r.norm(p+"post_attention_norm", randomWidth, false)
		linear(p+"ffn_gate_inp", randomWidth, experts)
		for name, shape := range map[string][2]int64{"gate": {randomWidth, randomFFN}, "up": {randomWidth, randomFFN}, "down": {randomFFN, randomWidth}} {
			r.tensor(p+"ffn_"+name+"_exps.weight", 1/math.Sqrt(float64(shape[0])), 0, shape[0], shape[1], experts)
			r.tensor(p+"ffn_"+name+"_exps.bias", 0.1, 0, shape[1], experts)
		}
	}
	r.norm("output_norm", randomWidth, false)
	r.matrix("output.weight", randomWidth, vocabulary)
	return r
}

// Attention of other kinds than llama's: what the graph has is what the enclave computes, whatever the model is called. Random weights carry a
// difference in rounding further than trained ones do.
func TestResidentKnowsOtherAttention(t *testing.T) {
	for name, build := range map[string]func() *random{"gemma2": gemma2, "mpt": mpt, "gpt-oss": gptOSS} {
		path := filepath.Join(t.TempDir(), name+".gguf")
		f, err := os.Create(path)
		if err == nil {
			_, err = build().WriteTo(f)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, flash := range []string{"on", "off"} {
			t.Run(name+", flash attention "+flash, func(t *testing.T) {
				args := []string{"-fa", flash, "-c", "1024", "-np", "1"}
				stock := startStock(t, path, nil, args...)
				shielded := startShielded(t, serveOptions{model: path, mode: "resident", args: args})
				all := map[string]any{"n_probs": vocabulary}
				worst := 0.0
				for _, prompt := range append([]string{prose(t)[:300]}, prompts...) {
					want, got := stock.complete(t, prompt, 4, all), shielded.complete(t, prompt, 4, all)
					for i := range min(len(want.Probs), len(got.Probs)) {
						worst = max(worst, distance(logits(t, want, i), logits(t, got, i)))
						if want.Tokens[i] != got.Tokens[i] {
							break
						}
					}
				}
				t.Logf("logits differ by %.1e relative at most", worst)
				if worst > 5e-3 { // a window, bias or cap that is missed is off by a tenth and more
					t.Errorf("logits differ by %.1e relative", worst)
				}
			})
		}
	}
}
