package shield

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/internal/gguf"
)

// draft is a model file that a test case changes before it is built.
type draft struct {
	keys    map[string]any
	tensors map[string]gguf.Tensor
	order   []string
}

func (d *draft) tensor(name string, kind gguf.Type, dims ...int64) {
	if _, again := d.tensors[name]; !again {
		d.order = append(d.order, name)
	}
	d.tensors[name] = gguf.Tensor{Name: name, Type: kind, Dims: dims}
}

func (d *draft) rename(from, to string) {
	t := d.tensors[from]
	delete(d.tensors, from)
	d.tensor(to, t.Type, t.Dims...)
}

// llama is a sound model: two layers, 4 query heads, 2 key/value heads, head dimension 8.
func llama() *draft {
	d := &draft{keys: map[string]any{
		"general.architecture": "llama", "general.name": "test", "llama.block_count": uint32(2),
		"llama.embedding_length": uint32(32), "llama.attention.head_count": uint32(4),
		"llama.attention.head_count_kv": uint32(2),
	}, tensors: map[string]gguf.Tensor{}}
	d.tensor("token_embd.weight", gguf.F16, 32, 64)
	for _, layer := range []string{"blk.0.", "blk.1."} {
		d.tensor(layer+"attn_norm.weight", gguf.F32, 32)
		d.tensor(layer+"attn_q.weight", gguf.Q8_0, 32, 32)
		d.tensor(layer+"attn_k.weight", gguf.F16, 32, 16)
		d.tensor(layer+"attn_v.weight", gguf.F32, 32, 16)
		d.tensor(layer+"attn_output.weight", gguf.F16, 32, 32)
		d.tensor(layer+"ffn_up.weight", gguf.F16, 32, 64)
	}
	return d
}

func (d *draft) build(t testing.TB, name string) File {
	t.Helper()
	var b gguf.Builder
	for key, value := range d.keys {
		b.Key(key, value)
	}
	for _, name := range d.order {
		if tensor, ok := d.tensors[name]; ok {
			b.Tensor(tensor.Name, tensor.Type, tensor.Dims, nil)
		}
	}
	var buf bytes.Buffer
	if _, err := b.WriteTo(&buf); err != nil {
		t.Fatal(err)
	}
	r := bytes.NewReader(buf.Bytes())
	f, err := gguf.Parse(r, r.Size())
	if err != nil {
		t.Fatal(err)
	}
	return File{File: f, Name: name, Data: r}
}

func TestReadSound(t *testing.T) {
	linear := func(d *draft) {
		d.keys["llama.rope.scaling.type"], d.keys["llama.rope.scaling.factor"] = "linear", float32(4)
	}
	tests := []struct {
		name    string
		change  func(d *draft)
		targets int
	}{
		{"as it is", func(*draft) {}, 6},
		{"heads per layer", func(d *draft) { d.keys["llama.attention.head_count_kv"] = []int32{2, 2} }, 6},
		{"linear scaling", linear, 6},
		{"yarn that does nothing", func(d *draft) { d.keys["llama.rope.scaling.type"] = "yarn" }, 6},
		{"biases", func(d *draft) {
			d.tensor("blk.0.attn_q.bias", gguf.F32, 32)
			d.tensor("blk.1.attn_v.bias", gguf.F32, 16)
			d.tensor("blk.1.attn_output.bias", gguf.F32, 32)
		}, 8},
		{"experts", func(d *draft) { d.tensor("blk.1.ffn_gate_exps.weight", gguf.F16, 32, 64, 4) }, 6},
		{"a scale", func(d *draft) { d.tensor("blk.1.attn_q.scale", gguf.F32, 1) }, 6},
		{"own factors", func(d *draft) { d.tensor("rope_freqs.weight", gguf.F32, 4) }, 6},
		{"stated head dimension", func(d *draft) {
			d.keys["llama.attention.key_length"], d.keys["llama.attention.value_length"] = uint32(8), uint32(8)
			d.keys["llama.rope.dimension_count"] = uint32(4)
		}, 6},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := llama()
			tt.change(d)
			p, err := Read([]File{d.build(t, "m.gguf")})
			if err != nil {
				t.Fatal(err)
			}
			if m := p.Model; m.Action != enclave.Shield || m.Layers != 2 || m.Heads != 4 || m.HeadsKV != 2 || m.HeadDim != 8 || m.RowFloats != 32 || m.Name != "test" {
				t.Errorf("model %+v", m)
			}
			if len(p.Targets) != tt.targets {
				t.Errorf("%d tensors to permute, want %d", len(p.Targets), tt.targets)
			}
		})
	}
}

// Where pairs do not all turn by one rule that the file can state, the frequency factors go into the graph.
func TestWhereFactorsGo(t *testing.T) {
	tests := map[string]struct {
		change  func(d *draft)
		inGraph bool
	}{
		"as it is":    {func(*draft) {}, false},
		"own factors": {func(d *draft) { d.tensor("rope_freqs.weight", gguf.F32, 4) }, false},
		"linear":      {func(d *draft) { d.keys["llama.rope.scaling.factor"] = float32(4) }, false},
		"yarn by one": {func(d *draft) { d.keys["llama.rope.scaling.type"] = "yarn" }, false},
		"yarn": {func(d *draft) {
			d.keys["llama.rope.scaling.type"], d.keys["llama.rope.scaling.factor"] = "yarn", float32(4)
		}, true},
		"yarn by its other key": {func(d *draft) {
			d.keys["llama.rope.scaling.yarn_ext_factor"], d.keys["llama.rope.scaling.factor"] = float32(1), float32(2)
		}, true},
		"long-rope":           {func(d *draft) { d.keys["llama.rope.scaling.type"] = "longrope" }, true},
		"two sets of factors": {func(d *draft) { d.tensor("rope_factors_long.weight", gguf.F32, 4) }, true},
		"two bases":           {func(d *draft) { d.keys["llama.rope.freq_base_swa"] = float32(100) }, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			d := llama()
			tt.change(d)
			p, err := Read([]File{d.build(t, "m.gguf")})
			if err != nil {
				t.Fatal(err)
			}
			if p.InGraph != tt.inGraph || (p.Marker.Tensor.Name == "blk.0.attn_norm.weight") != tt.inGraph {
				t.Errorf("in the graph: %v, marker %q", p.InGraph, p.Marker.Tensor.Name)
			}
		})
	}
}

func TestReadRefused(t *testing.T) {
	tests := []struct {
		name   string
		change func(d *draft)
		want   string
	}{
		{"architecture", func(d *draft) { d.keys["general.architecture"] = "mamba" }, `architecture "mamba" is not supported by mode permute, whose table of architectures does not have it; run it in mode resident`},
		{"label is not enough", func(d *draft) {
			d.keys["general.architecture"], d.keys["general.type"] = "qwen2vl", "mmproj"
		}, `architecture "qwen2vl"`},
		{"norm of queries", func(d *draft) { d.tensor("blk.0.attn_q_norm.weight", gguf.F32, 8) }, "attn_q_norm"},
		{"sinks", func(d *draft) { d.tensor("blk.1.attn_sinks.weight", gguf.F32, 4) }, "attn_sinks"},
		{"recurrent", func(d *draft) { d.tensor("blk.1.ssm_in.weight", gguf.F32, 32) }, "layer 1 keeps a recurrent state"},
		{"encoder and decoder", func(d *draft) {
			d.tensor("enc.blk.0.attn_q.weight", gguf.F32, 32)
			d.tensor("dec.blk.0.attn_q.weight", gguf.F32, 32)
		}, "encoder-decoder"},
		{"cross attention", func(d *draft) { d.tensor("dec.blk.0.cross_attn_q.weight", gguf.F32, 32) }, "cross_attn_q"},
		{"odd layer number", func(d *draft) { d.tensor("blk.00.attn_q.weight", gguf.F32, 32, 32) }, "blk.00"},
		{"beyond the layers", func(d *draft) { d.tensor("blk.2.attn_q.weight", gguf.F32, 32, 32) }, "beyond the model's 2 layers"},
		{"scale per row", func(d *draft) { d.tensor("blk.0.attn_q.scale", gguf.F32, 32) }, "attn_q.scale"},
		{"latent attention", func(d *draft) { d.keys["llama.attention.kv_lora_rank"] = uint32(8) }, "kv_lora_rank"},
		{"layers without heads", func(d *draft) { d.keys["llama.attention.head_count_kv"] = []uint32{2, 0} }, "layers without attention"},
		{"no key/value heads", func(d *draft) { d.keys["llama.attention.head_count_kv"] = uint32(0) }, "without key/value heads"},
		{"heads of another size", func(d *draft) { d.keys["llama.attention.key_length_swa"] = uint32(4) }, "key_length_swa"},
		{"another number of rotated rows", func(d *draft) { d.keys["llama.rope.dimension_count_swa"] = uint32(4) }, "dimension_count_swa"},
		{"sections", func(d *draft) { d.keys["llama.rope.dimension_sections"] = []int32{1, 1, 2, 0} }, "dimension_sections"},
		{"huge head", func(d *draft) { d.keys["llama.attention.value_length"] = uint32(1 << 20) }, "larger than mode permute supports"},
		{"huge tables", func(d *draft) { d.keys["llama.block_count"] = uint32(1 << 30) }, "more than mode permute supports"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := llama()
			tt.change(d)
			_, err := Read([]File{d.build(t, "m.gguf")})
			var refused *enclave.RefusedError
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want a RefusedError with %q", err, tt.want)
			}
		})
	}
}

func TestReadInvalid(t *testing.T) {
	tests := []struct {
		name   string
		change func(d *draft)
		want   string
	}{
		{"no architecture", func(d *draft) { delete(d.keys, "general.architecture") }, "general.architecture"},
		{"no layers", func(d *draft) { delete(d.keys, "llama.block_count") }, "0 layers"},
		{"no heads", func(d *draft) { delete(d.keys, "llama.attention.head_count") }, "0 query heads"},
		{"wrong type", func(d *draft) { d.keys["llama.block_count"] = "two" }, "block_count"},
		{"out of range", func(d *draft) { d.keys["llama.embedding_length"] = uint64(1 << 40) }, "out of range"},
		{"empty array", func(d *draft) { d.keys["llama.attention.head_count"] = []uint32{} }, "array of 0"},
		{"heads that do not divide", func(d *draft) { d.keys["llama.attention.head_count_kv"] = uint32(3) }, "no multiple"},
		{"odd rotation", func(d *draft) { d.keys["llama.rope.dimension_count"] = uint32(5) }, "5 of 8 rows"},
		{"too much rotation", func(d *draft) { d.keys["llama.rope.dimension_count"] = uint32(10) }, "10 of 8 rows"},
		{"no rotation", func(d *draft) { d.keys["llama.rope.dimension_count"] = uint32(0) }, "0 of 8 rows"},
		{"base of zero", func(d *draft) { d.keys["llama.rope.freq_base"] = float32(0) }, "base 0"},
		{"negative base", func(d *draft) { d.keys["llama.rope.freq_base"] = float32(-10000) }, "base -10000"},
		{"missing tensor", func(d *draft) { delete(d.tensors, "blk.1.attn_k.weight") }, `"blk.1.attn_k.weight" is missing: layer 1 of 2`},
		{"missing layer", func(d *draft) { d.keys["llama.block_count"] = uint32(3) }, `"blk.2.attn_k.weight" is missing`},
		{"missing output", func(d *draft) { delete(d.tensors, "blk.0.attn_output.weight") }, `"blk.0.attn_output.weight" is missing`},
		{"fused with too few rows", func(d *draft) { d.rename("blk.0.attn_q.weight", "blk.0.attn_qkv.weight") }, "expected 64 rows of queries, keys and values"},
		{"too few rows", func(d *draft) { d.tensor("blk.0.attn_v.weight", gguf.F32, 32, 8) }, "8 rows of 2 heads"},
		{"another width", func(d *draft) { d.tensor("blk.1.attn_v.weight", gguf.F32, 64, 16) }, "rows of 64 elements"},
		{"three dimensions", func(d *draft) { d.tensor("blk.1.attn_v.weight", gguf.F32, 32, 8, 2) }, "expected 8 rows"},
		{"one dimension", func(d *draft) { d.tensor("blk.1.attn_v.weight", gguf.F32, 512) }, "expected 8 rows"},
		{"narrow output", func(d *draft) { d.tensor("blk.1.attn_output.weight", gguf.F32, 16, 32) }, "expected rows of 32"},
		{"bias of another type", func(d *draft) { d.tensor("blk.1.attn_k.bias", gguf.F16, 16) }, "expected F32 and 16"},
		{"long bias", func(d *draft) { d.tensor("blk.1.attn_k.bias", gguf.F32, 32) }, "expected F32 and 16"},
		{"long factors", func(d *draft) { d.tensor("rope_freqs.weight", gguf.F32, 8) }, "expected F32 and 4"},
		{"one of a split", func(d *draft) { d.keys["split.count"] = uint16(3) }, "belongs to a model of 3 files, 1 given"},
		{"second as first", func(d *draft) { d.keys["split.no"] = uint16(1) }, "name them in order"},
		{"tensors that are not there", func(d *draft) { d.keys["split.tensors.count"] = int32(100) }, "should have 100 tensors"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := llama()
			tt.change(d)
			_, err := Read([]File{d.build(t, "m.gguf")})
			var invalid *enclave.InvalidError
			if !errors.As(err, &invalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want an InvalidError with %q", err, tt.want)
			}
		})
	}
	if _, err := Read(nil); err == nil {
		t.Error("a model without files was accepted")
	}
	twice := llama().build(t, "a.gguf")
	if err := new(Plan).find(architectures["llama"], []File{twice, twice}); err == nil {
		t.Error("a tensor in two files was accepted")
	}
}

func TestReadOther(t *testing.T) {
	only := func(name string, keys map[string]any, tensors ...string) *draft {
		d := &draft{keys: keys, tensors: map[string]gguf.Tensor{}}
		d.keys["general.architecture"] = name
		for _, tensor := range tensors {
			d.tensor(tensor, gguf.F32, 4)
		}
		return d
	}
	adapter := func(tensors ...string) *draft {
		return only("llama", map[string]any{"general.type": "adapter"}, tensors...)
	}
	tests := []struct {
		name string
		d    *draft
		want string // of the refusal; empty for a file that passes
	}{
		{"projector", only("clip", map[string]any{"general.type": "mmproj"}, "v.blk.0.attn_q.weight"), ""},
		{"control vector", only("controlvector", map[string]any{}, "direction.1"), ""},
		{"vocabulary", only("llama", map[string]any{}), ""},
		{"adapter elsewhere", adapter("blk.0.ffn_up.weight.lora_a", "blk.0.ffn_up.weight.lora_b"), ""},
		{"adapter on the projection", adapter("blk.0.attn_output.weight.lora_a"), ""},
		{"adapter on values", adapter("blk.0.ffn_up.weight.lora_a", "blk.3.attn_v.weight.lora_b"), `changes "blk.3.attn_v.weight"`},
		{"adapter on fused rows", adapter("blk.0.attn_qkv.weight.lora_a"), "attn_qkv"},
		{"model labelled as an adapter", adapter("blk.0.attn_output.weight"), "does not belong into a LoRA adapter"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Read([]File{tt.d.build(t, "m.gguf")})
			if tt.want == "" {
				if err != nil || p.Model.Action != enclave.Pass {
					t.Errorf("plan %+v, error %v, want it to pass", p, err)
				}
				return
			}
			var refused *enclave.RefusedError
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want a RefusedError with %q", err, tt.want)
			}
		})
	}
}
