package vault

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/internal/gguf"
)

// sample describes a small random llama model.
type sample struct {
	layers, heads, kv, dim, values, rot, width int
	base                                       float32
	kind                                       gguf.Type // of q, k and v
	own, bias                                  bool
	files                                      int
}

var standard = sample{layers: 2, heads: 4, kv: 2, dim: 16, values: 16, rot: 16, width: 32, base: 10000, kind: gguf.F16, files: 1}

func with(change func(*sample)) sample {
	s := standard
	change(&s)
	return s
}

// build writes the model's files and returns their paths.
func (s sample) build(t testing.TB, seed uint64) []string {
	t.Helper()
	random := rand.New(rand.NewPCG(seed, 1))
	builders := make([]gguf.Builder, s.files)
	all := s.tensors()
	for i := range builders {
		s.keys(&builders[i], i, len(all))
	}
	for i, tensor := range all {
		b := &builders[i*s.files/len(all)]
		b.Tensor(tensor.Name, tensor.Type, tensor.Dims, func(w io.Writer) error { return fill(w, tensor, random) })
	}
	dir := t.TempDir()
	var paths []string
	for i := range builders {
		path := filepath.Join(dir, fmt.Sprintf("m-%05d-of-%05d.gguf", i+1, s.files))
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := builders[i].WriteTo(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
		paths = append(paths, path)
	}
	return paths
}

func (s sample) keys(b *gguf.Builder, file, tensors int) {
	if s.files > 1 {
		b.Key("split.count", uint16(s.files))
		b.Key("split.no", uint16(file))
		b.Key("split.tensors.count", int32(tensors))
	}
	if file > 0 {
		return
	}
	b.Key("general.architecture", "llama")
	b.Key("llama.block_count", uint32(s.layers))
	b.Key("llama.embedding_length", uint32(s.width))
	b.Key("llama.attention.head_count", uint32(s.heads))
	b.Key("llama.attention.head_count_kv", uint32(s.kv))
	b.Key("llama.attention.key_length", uint32(s.dim))
	b.Key("llama.attention.value_length", uint32(s.values))
	b.Key("llama.rope.dimension_count", uint32(s.rot))
	b.Key("llama.rope.freq_base", s.base)
	b.Key("tokenizer.ggml.tokens", []string{"a", "b", "c"})
}

func (s sample) tensors() []gguf.Tensor {
	w := int64(s.width)
	list := []gguf.Tensor{{Name: "token_embd.weight", Type: gguf.F16, Dims: []int64{w, 3}}}
	if s.own {
		list = append(list, gguf.Tensor{Name: "rope_freqs.weight", Type: gguf.F32, Dims: []int64{int64(s.rot / 2)}})
	}
	add := func(layer int, name string, kind gguf.Type, dims ...int64) {
		list = append(list, gguf.Tensor{Name: fmt.Sprintf("blk.%d.%s", layer, name), Type: kind, Dims: dims})
	}
	for layer := range s.layers {
		rows := map[string]int64{"attn_q": int64(s.heads * s.dim), "attn_k": int64(s.kv * s.dim), "attn_v": int64(s.kv * s.values)}
		for _, name := range []string{"attn_k", "attn_q", "attn_v"} {
			if s.bias {
				add(layer, name+".bias", gguf.F32, rows[name])
			}
			add(layer, name+".weight", s.kind, w, rows[name])
		}
		add(layer, "attn_output.weight", gguf.F16, int64(s.heads*s.values), w)
		add(layer, "attn_norm.weight", gguf.F32, w)
		add(layer, "ffn_up.weight", gguf.Q8_0, w, 5)
	}
	list = append(list, gguf.Tensor{Name: "output_norm.weight", Type: gguf.F32, Dims: []int64{3}})
	if _, err := gguf.Place(list, 32); err != nil {
		panic(err)
	}
	return list
}

// fill writes random elements between about -0.5 and 0.5; frequency factors lie between 1 and 8.
func fill(w io.Writer, t gguf.Tensor, random *rand.Rand) error {
	raw := make([]byte, t.Size)
	switch t.Type {
	case gguf.F32:
		for i := 0; i < len(raw); i += 4 {
			x := random.Float32() - 0.5
			if t.Name == "rope_freqs.weight" {
				x = 1 + 7*random.Float32()
			}
			binary.LittleEndian.PutUint32(raw[i:], math.Float32bits(x))
		}
	case gguf.F16:
		for i := 0; i < len(raw); i += 2 { // sign, exponent of 2^-2 to 2^-5, mantissa
			bits := uint16(random.Uint32())&0x83ff | uint16(10+random.IntN(4))<<10
			binary.LittleEndian.PutUint16(raw[i:], bits)
		}
	case gguf.Q8_0:
		for i := range raw {
			raw[i] = byte(random.Uint32())
		}
		for i := 0; i < len(raw); i += 34 { // a scale of about 2^-9
			binary.LittleEndian.PutUint16(raw[i:], 6<<10|uint16(random.Uint32())&0x3ff)
		}
	}
	_, err := w.Write(raw)
	return err
}

// decode turns stored elements into numbers.
func decode(kind gguf.Type, raw []byte) []float64 {
	var list []float64
	switch kind {
	case gguf.F32:
		for i := 0; i < len(raw); i += 4 {
			list = append(list, float64(math.Float32frombits(binary.LittleEndian.Uint32(raw[i:]))))
		}
	case gguf.F16:
		for i := 0; i < len(raw); i += 2 {
			list = append(list, half(binary.LittleEndian.Uint16(raw[i:])))
		}
	case gguf.Q8_0:
		for i := 0; i < len(raw); i += 34 {
			scale := half(binary.LittleEndian.Uint16(raw[i:]))
			for _, q := range raw[i+2 : i+34] {
				list = append(list, scale*float64(int8(q)))
			}
		}
	}
	return list
}

// half decodes a normal half-precision number.
func half(bits uint16) float64 {
	x := math.Ldexp(1+float64(bits&0x3ff)/1024, int(bits>>10&31)-15)
	if bits&0x8000 != 0 {
		return -x
	}
	return x
}

func emptyFiles(t testing.TB, n int) []string {
	t.Helper()
	dir := t.TempDir()
	var paths []string
	for i := range n {
		path := filepath.Join(dir, fmt.Sprintf("out%d", i))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	return paths
}

// load makes a shielded model complete, copies included.
func load(t testing.TB, v *Vault, from []string) (enclave.LoadResult, []string) {
	t.Helper()
	to := emptyFiles(t, len(from))
	res, err := v.Load(t.Context(), enclave.LoadRequest{Sources: from, Outputs: to})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range res.Copies {
		doCopy(t, c, from[c.File], to[c.File])
	}
	return res, to
}

func doCopy(t testing.TB, c enclave.Copy, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	n, err := io.Copy(io.NewOffsetWriter(out, c.To), io.NewSectionReader(in, c.From, c.Length))
	if err != nil || n != c.Length {
		t.Fatalf("copy %+v: %d bytes, %v", c, n, err)
	}
}

// contents maps the names of tensors to their bytes, over all files of a model.
func contents(t testing.TB, paths []string) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	for _, path := range paths {
		r, f, err := gguf.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, tensor := range f.Tensors {
			raw := make([]byte, tensor.Size)
			if _, err := r.ReadAt(raw, f.DataOffset+tensor.Offset); err != nil {
				t.Fatal(err)
			}
			all[tensor.Name] = raw
		}
		r.Close()
	}
	return all
}
