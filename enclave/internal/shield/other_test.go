package shield

import (
	"errors"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/internal/gguf"
)

// as is the draft under another architecture's name.
func (d *draft) as(architecture string) *draft {
	for key, value := range d.keys {
		if rest, ok := strings.CutPrefix(key, "llama."); ok {
			delete(d.keys, key)
			d.keys[architecture+"."+rest] = value
		}
	}
	d.keys["general.architecture"] = architecture
	return d
}

// roles counts a plan's targets.
func roles(p *Plan) map[Role]int {
	n := map[Role]int{}
	for _, t := range p.Targets {
		n[t.Role]++
	}
	return n
}

func TestFactorsInTheGraph(t *testing.T) {
	d := llama().as("qwen3")
	for _, layer := range []string{"blk.0.", "blk.1."} {
		d.tensor(layer+"attn_q_norm.weight", gguf.F32, 8)
		d.tensor(layer+"attn_k_norm.weight", gguf.F32, 8)
	}
	p, err := Read([]File{d.build(t, "m.gguf")})
	if err != nil {
		t.Fatal(err)
	}
	if !p.InGraph || p.Marker.Tensor.Name != "blk.0.attn_norm.weight" || p.Marker.Tensor.Size == 0 || p.Shape.Rope != RopeNeox {
		t.Errorf("plan %+v", p)
	}
	if n := roles(p); n[HeadNorm] != 4 || n[Query] != 2 || n[Key] != 2 || n[Value] != 2 {
		t.Errorf("targets %v", n)
	}
}

func TestNormsOverAllHeads(t *testing.T) {
	d := llama().as("olmo2")
	for _, layer := range []string{"blk.0.", "blk.1."} {
		d.tensor(layer+"attn_q_norm.weight", gguf.F32, 32)
		d.tensor(layer+"attn_k_norm.weight", gguf.F32, 16)
	}
	p, err := Read([]File{d.build(t, "m.gguf")})
	if err != nil {
		t.Fatal(err)
	}
	if n := roles(p); n[HeadNorm] != 0 || n[Query] != 4 || n[Key] != 4 {
		t.Errorf("targets %v", n)
	}
}

func TestFusedTensors(t *testing.T) {
	d := llama().as("phi3")
	for _, layer := range []string{"blk.0.", "blk.1."} {
		for _, name := range []string{"attn_q", "attn_k", "attn_v"} {
			delete(d.tensors, layer+name+".weight")
		}
		d.tensor(layer+"attn_qkv.weight", gguf.Q8_0, 32, 64)
		d.tensor(layer+"attn_qkv.bias", gguf.F32, 64)
	}
	p, err := Read([]File{d.build(t, "m.gguf")})
	if err != nil {
		t.Fatal(err)
	}
	first := map[Role]int64{Query: 0, Key: 32, Value: 48}
	for _, target := range p.Targets {
		if target.First != first[target.Role] {
			t.Errorf("%s: %v begins at row %d, want %d", target.Tensor.Name, target.Role, target.First, first[target.Role])
		}
	}
	if len(p.Targets) != 12 || p.Model.ShieldBytes != 2*(64*34+64*4)+16 {
		t.Errorf("%d targets, %d bytes", len(p.Targets), p.Model.ShieldBytes)
	}
}

func TestSinksFollowTheirHeads(t *testing.T) {
	d := llama().as("gpt-oss")
	d.tensor("blk.0.attn_sinks.weight", gguf.F32, 4)
	p, err := Read([]File{d.build(t, "m.gguf")})
	if err != nil {
		t.Fatal(err)
	}
	if n := roles(p); n[Sink] != 1 {
		t.Errorf("targets %v", n)
	}
	perm := draw(t, p.Shape, 7)
	for h := range p.Shape.Heads {
		query, _ := perm.Head(Query, 0, h)
		if sink, rows := perm.Head(Sink, 0, h); sink != query || len(rows) != 1 || rows[0] != 0 {
			t.Errorf("head %d: sink %d %v, query %d", h, sink, rows, query)
		}
	}
}

// A gate is multiplied with the attention output: its rows stand where the numbers of that do.
func TestGatesFollowTheAttentionOutput(t *testing.T) {
	d := llama().as("afmoe")
	d.tensor("blk.0.attn_gate.weight", gguf.F32, 32, 32)
	d.tensor("blk.1.attn_gate.weight", gguf.F32, 32, 4)
	p, err := Read([]File{d.build(t, "m.gguf")})
	if err != nil {
		t.Fatal(err)
	}
	if n := roles(p); n[Gate] != 1 || n[HeadGate] != 1 {
		t.Errorf("targets %v", n)
	}
	perm := draw(t, p.Shape, 8)
	table, dim := make([]uint16, p.Shape.RowOf(0)), p.Shape.ValueDim
	perm.Inverse(0, table)
	for h := range p.Shape.Heads {
		from, rows := perm.Head(Gate, 0, h)
		for i, row := range rows {
			if at := int(table[from*dim+int(row)]); at != h*dim+i {
				t.Errorf("the gate of number %d of head %d is at %d, the number itself at %d", row, from, h*dim+i, at)
			}
		}
		query, _ := perm.Head(Query, 1, h)
		if from, rows := perm.Head(HeadGate, 1, h); from != query || len(rows) != 1 {
			t.Errorf("head %d: gate of head %d, queries of head %d", h, from, query)
		}
	}
}

func TestWhyAnArchitectureIsRefused(t *testing.T) {
	for want, change := range map[string]func(d *draft){
		"(MLA)":             func(d *draft) { d.keys["strange.attention.kv_lora_rank"] = uint32(8) },
		"(M-RoPE)":          func(d *draft) { d.keys["strange.rope.dimension_sections"] = []int32{1, 1, 2, 0} },
		"an indexer":        func(d *draft) { d.tensor("blk.1.indexer.proj.weight", gguf.F32, 32, 2) },
		"values of another": func(d *draft) { d.keys["strange.attention.shared_kv_layers"] = uint32(1) },
		"no norms": func(d *draft) {
			delete(d.tensors, "blk.0.attn_norm.weight")
			delete(d.tensors, "blk.0.ffn_norm.weight")
		},
		"no values":        func(d *draft) { delete(d.tensors, "blk.0.attn_v.weight") },
		"does not have it": func(d *draft) {},
	} {
		d := llama().as("strange")
		change(d)
		_, err := Read([]File{d.build(t, "m.gguf")})
		var refused *enclave.RefusedError
		if !errors.As(err, &refused) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), `"strange" is not supported by mode permute`) {
			t.Errorf("%v, want a RefusedError with %q", err, want)
		}
	}
}

func TestNoNormIsRefused(t *testing.T) {
	d := llama().as("qwen2")
	delete(d.tensors, "blk.0.attn_norm.weight")
	_, err := Read([]File{d.build(t, "m.gguf")})
	var refused *enclave.RefusedError
	if !errors.As(err, &refused) || !strings.Contains(err.Error(), "no norm of its own") {
		t.Errorf("error %v", err)
	}
}

func TestBothModesRefuseOtherStates(t *testing.T) {
	for tensor, want := range map[string]string{
		"blk.1.ssm_in.weight": "recurrent state", "blk.0.time_mix_w1.weight": "recurrent state", "blk.0.shortconv.conv.weight": "recurrent state",
	} {
		d := llama()
		d.tensor(tensor, gguf.F32, 32)
		file := []File{d.build(t, "m.gguf")}
		_, err := Read(file)
		_, err2 := Identify(file)
		for _, e := range []error{err, err2} {
			var refused *enclave.RefusedError
			if !errors.As(e, &refused) || !strings.Contains(e.Error(), want) {
				t.Errorf("%s: %v, want a RefusedError with %q", tensor, e, want)
			}
		}
	}
}

func TestEncodersKeepNoCache(t *testing.T) {
	for _, name := range []string{"bert", "dream"} {
		file := []File{llama().as(name).build(t, "m.gguf")}
		p, err := Read(file)
		if err != nil || p.Model.Action != enclave.Pass || p.Model.Layers != 2 {
			t.Errorf("plan %+v, error %v", p, err)
		}
		m, err := Identify(file)
		if err != nil || m.Action != enclave.Reside || m.CacheFloats != 0 || m.Layers != 2 {
			t.Errorf("model %+v, error %v", m, err)
		}
	}
}

func TestCacheSize(t *testing.T) {
	d := llama()
	d.keys["llama.context_length"] = uint32(2048)
	d.keys["llama.attention.head_count_kv"] = []uint32{2, 1}
	d.keys["llama.attention.value_length"] = uint32(4)
	m, err := Identify([]File{d.build(t, "m.gguf")})
	if err != nil || m.Context != 2048 || m.CacheFloats != 3*(8+4) {
		t.Errorf("model %+v, error %v", m, err)
	}
}
