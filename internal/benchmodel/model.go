package main

import (
	"fmt"
	"io"
	"math"

	"github.com/kvshield/kvshield/internal/gguf"
)

// model is the shape of a model, and how its weights are stored and drawn.
type model struct {
	layers, width, heads, headsKV, ffn, vocab, context int64

	kind      gguf.Type
	tied      bool
	ropeFreqs bool
	seed      uint64
}

func (m model) headDim() int64 { return m.width / m.heads }

func (m model) check() error {
	for _, n := range []int64{m.layers, m.width, m.heads, m.headsKV, m.ffn, m.vocab, m.context} {
		if n < 1 || n > 1<<20 {
			return usageError{fmt.Errorf("a size of %d: use one between 1 and %d", n, 1<<20)}
		}
	}
	switch {
	case m.width%m.heads != 0 || m.headDim()%2 != 0:
		return usageError{fmt.Errorf("width %d and %d heads give no even head dimension: change one", m.width, m.heads)}
	case m.heads%m.headsKV != 0:
		return usageError{fmt.Errorf("%d heads are no multiple of %d key/value heads: change one", m.heads, m.headsKV)}
	case m.vocab < fixedTokens:
		return usageError{fmt.Errorf("a vocabulary of %d: at least %d tokens are needed", m.vocab, fixedTokens)}
	}
	return nil
}

// parameters counts the weights of the matrices.
func (m model) parameters() int64 {
	attention := 2*m.width*m.width + 2*m.width*m.headsKV*m.headDim()
	tables := m.vocab * m.width
	if !m.tied {
		tables *= 2
	}
	return m.layers*(attention+3*m.width*m.ffn) + tables
}

func (m model) build() (*gguf.Builder, error) {
	b := &gguf.Builder{}
	m.describe(b)
	addVocabulary(b, int(m.vocab))
	m.matrix(b, "token_embd.weight", m.width, m.vocab)
	if m.ropeFreqs {
		m.vector(b, "rope_freqs.weight", factors(m.headDim()))
	}
	for layer := range m.layers {
		m.layer(b, fmt.Sprintf("blk.%d.", layer))
	}
	m.vector(b, "output_norm.weight", ones(m.width))
	if !m.tied {
		m.matrix(b, "output.weight", m.width, m.vocab)
	}
	_, err := b.Size()
	return b, err
}

func (m model) describe(b *gguf.Builder) {
	fileTypes := map[gguf.Type]uint32{gguf.F32: 0, gguf.F16: 1, gguf.Q8_0: 7}
	b.Key("general.architecture", "llama")
	b.Key("general.name", "kvshield synthetic")
	b.Key("general.file_type", fileTypes[m.kind])
	b.Key("llama.block_count", uint32(m.layers))
	b.Key("llama.context_length", uint32(m.context))
	b.Key("llama.embedding_length", uint32(m.width))
	b.Key("llama.feed_forward_length", uint32(m.ffn))
	b.Key("llama.vocab_size", uint32(m.vocab))
	b.Key("llama.attention.head_count", uint32(m.heads))
	b.Key("llama.attention.head_count_kv", uint32(m.headsKV))
	b.Key("llama.attention.layer_norm_rms_epsilon", float32(1e-5))
	b.Key("llama.rope.dimension_count", uint32(m.headDim()))
	b.Key("llama.rope.freq_base", float32(ropeBase))
}

func (m model) layer(b *gguf.Builder, prefix string) {
	m.vector(b, prefix+"attn_norm.weight", ones(m.width))
	m.matrix(b, prefix+"attn_q.weight", m.width, m.width)
	m.matrix(b, prefix+"attn_k.weight", m.width, m.headsKV*m.headDim())
	m.matrix(b, prefix+"attn_v.weight", m.width, m.headsKV*m.headDim())
	m.matrix(b, prefix+"attn_output.weight", m.width, m.width)
	m.vector(b, prefix+"ffn_norm.weight", ones(m.width))
	m.matrix(b, prefix+"ffn_gate.weight", m.width, m.ffn)
	m.matrix(b, prefix+"ffn_up.weight", m.width, m.ffn)
	m.matrix(b, prefix+"ffn_down.weight", m.ffn, m.width)
}

func (m model) matrix(b *gguf.Builder, name string, columns, rows int64) {
	b.Tensor(name, m.kind, []int64{columns, rows}, func(w io.Writer) error {
		return newNoise(m.seed, name, columns).write(w, m.kind, columns*rows)
	})
}

func (m model) vector(b *gguf.Builder, name string, values []float32) {
	b.Tensor(name, gguf.F32, []int64{int64(len(values))}, func(w io.Writer) error {
		return writeFloats(w, values)
	})
}

func ones(n int64) []float32 {
	list := make([]float32, n)
	for i := range list {
		list[i] = 1
	}
	return list
}

const ropeBase = 500000

// factors are the frequency factors by which Llama 3.1 stretches an original context of 8,192
// eightfold: long waves by all of it, short ones not at all, those between in part.
func factors(headDim int64) []float32 {
	const stretch, original, low, high = 8, 8192, 1, 4
	list := make([]float32, headDim/2)
	for i := range list {
		wave := 2 * math.Pi * math.Pow(ropeBase, float64(2*i)/float64(headDim))
		share := min(1, max(0, (original/wave-low)/(high-low)))
		list[i] = float32(1 / ((1-share)/stretch + share))
	}
	return list
}
