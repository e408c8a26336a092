package tinymodel

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"

	"github.com/kvshield/kvshield/internal/gguf"
)

// Vocabulary is the number of tokens of every tiny model. All text falls to bytes.
const Vocabulary = 1024

// FirstWord is the first token that is not a single byte or a mark.
const FirstWord = 3 + 256

// Tensor is a tensor of a recipe. Dims are in GGUF's order: the length of a row first.
type Tensor struct {
	Name string
	Dims []int64
}

// Recipe is what an architecture's tiny model is made of. All is stored as F32.
type Recipe struct {
	Architecture string
	Keys         map[string]any // without the architecture's name
	Order        []string       // of Keys
	Tensors      []Tensor
}

func (r *Recipe) set(key string, value any) {
	if _, ok := r.Keys[key]; !ok {
		r.Order = append(r.Order, key)
	}
	r.Keys[key] = value
}

// Write makes a GGUF file. The same recipe makes the same file.
func (r *Recipe) Write(path string) error { return r.write(path, true) }

// write leaves all numbers zero when they do not matter.
func (r *Recipe) write(path string, filled bool) error {
	var b gguf.Builder
	b.Key("general.architecture", r.Architecture)
	for _, key := range r.Order {
		name := r.Architecture + "." + key
		if strings.HasPrefix(key, "tokenizer.") || strings.HasPrefix(key, "xielu.") {
			name = key // engines look for these under no architecture
		}
		b.Key(name, r.Keys[key])
	}
	words(&b)
	for _, t := range r.Tensors {
		var data func(io.Writer) error
		if filled {
			data = numbers(t)
		}
		b.Tensor(t.Name, gguf.F32, t.Dims, data)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = b.WriteTo(f)
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}

// words is a vocabulary of bytes and made-up words.
func words(b *gguf.Builder) {
	pieces, types := []string{"<unk>", "<s>", "</s>"}, []int32{2, 3, 3}
	for i := range 256 {
		pieces, types = append(pieces, fmt.Sprintf("<0x%02X>", i)), append(types, 6)
	}
	for len(pieces) < Vocabulary {
		pieces, types = append(pieces, fmt.Sprintf("w%d", len(pieces))), append(types, 1)
	}
	b.Key("tokenizer.ggml.model", "llama")
	b.Key("tokenizer.ggml.tokens", pieces)
	b.Key("tokenizer.ggml.scores", make([]float32, len(pieces)))
	b.Key("tokenizer.ggml.token_type", types)
	b.Key("tokenizer.ggml.bos_token_id", uint32(1))
	b.Key("tokenizer.ggml.eos_token_id", uint32(2))
}

// scale is the mean and the deviation of a tensor's numbers: what keeps activations near one, and attention sharp enough that a
// change in it is seen.
func scale(t Tensor) (mean, deviation float64) {
	base := t.Name[:strings.LastIndex(t.Name, ".")+1]
	switch {
	case strings.Contains(t.Name, "rope_f"):
		return 1.5, 0.2
	case strings.HasSuffix(t.Name, ".bias"):
		return 0, 0.1
	case strings.HasSuffix(base, "attn_q_norm."), strings.HasSuffix(base, "attn_k_norm."):
		return 0.5, 0.1 // scores of normalised heads are large where they are not scaled
	case len(t.Dims) == 1 && strings.HasSuffix(base, "norm."):
		return 1, 0.1
	case len(t.Dims) == 1:
		return 1, 0.3
	}
	return 0, 1 / math.Sqrt(float64(t.Dims[0]))
}

func numbers(t Tensor) func(io.Writer) error {
	return func(w io.Writer) error {
		h := fnv.New64a()
		h.Write([]byte(t.Name))
		source := rand.New(rand.NewPCG(1, h.Sum64()))
		mean, deviation := scale(t)
		n := int64(1)
		for _, d := range t.Dims {
			n *= d
		}
		buf := make([]byte, 0, 4*n)
		for range n {
			x := float32(mean + deviation*source.NormFloat64())
			if strings.Contains(t.Name, "rope_f") {
				x = float32(math.Abs(float64(x)) + 0.1)
			}
			buf = binary.LittleEndian.AppendUint32(buf, math.Float32bits(x))
		}
		_, err := w.Write(buf)
		return err
	}
}

func sortedKeys[T any](m map[string]T) []string { return slices.Sorted(maps.Keys(m)) }
