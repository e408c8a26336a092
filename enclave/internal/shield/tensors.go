package shield

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/internal/gguf"
)

// finder goes through the tensors of a model once.
type finder struct {
	arch   architecture
	shape  Shape
	width  int64 // length of a row of the weights; 0 until one was seen
	seen   map[string]bool
	marker *Marker
	list   []Target
}

// find fills in Targets and Marker.
func (p *Plan) find(arch architecture, files []File) error {
	f := finder{arch: arch, shape: p.Shape, seen: map[string]bool{}}
	for i, file := range files {
		for _, t := range file.Tensors {
			if f.seen[t.Name] {
				return enclave.Invalid("%s: tensor %q is in an earlier file already", file.Name, t.Name)
			}
			f.seen[t.Name] = true
			if err := f.tensor(i, t); err != nil {
				return err
			}
		}
	}
	if err := f.complete(); err != nil {
		return err
	}
	p.Targets, p.InGraph = f.list, arch.factors == ""
	if p.InGraph && f.marker == nil {
		return enclave.Refuse("the first layer has no norm of its own by which mode permute could tell the model's graphs")
	}
	p.Marker = f.place()
	return nil
}

func (f *finder) tensor(file int, t gguf.Tensor) error {
	switch layer, rest, inLayer := cutLayer(t.Name); {
	case inLayer && layer >= f.shape.Layers:
		return enclave.Refuse("tensor %q lies beyond the model's %d layers, which mode permute does not support", t.Name, f.shape.Layers)
	case inLayer:
		return f.layerTensor(file, layer, rest, t)
	case t.Name == f.arch.factors:
		f.marker = &Marker{file, t}
		return f.checkMarker(t)
	case slices.Contains(ownFactors, t.Name):
		return nil // the hook takes them along with the graph's
	case strings.Contains(t.Name, "attn"), strings.Contains(t.Name, "blk."):
		return enclave.Refuse("tensor %q is not supported by mode permute for this architecture", t.Name)
	}
	return nil
}

// cutLayer takes "blk.N." off a name. A number that is not written as engines write it is no layer.
func cutLayer(name string) (layer int, rest string, ok bool) {
	number, rest, ok := strings.Cut(strings.TrimPrefix(name, "blk."), ".")
	if !ok || !strings.HasPrefix(name, "blk.") {
		return 0, "", false
	}
	layer, err := strconv.Atoi(number)
	return layer, rest, err == nil && layer >= 0 && strconv.Itoa(layer) == number
}

func (f *finder) layerTensor(file, layer int, name string, t gguf.Tensor) error {
	base, kind, _ := strings.Cut(name, ".")
	role, permuted := f.arch.weights[base]
	switch {
	case !permuted && f.arch.leavesAlone(base):
		f.consider(file, layer, name, t)
		return f.checkOutput(layer, name, t)
	case base == "attn_qkv" && (kind == "weight" || kind == "bias"):
		return f.fused(file, layer, kind, t)
	case base == "attn_sinks" && kind == "weight" && f.arch.sinks:
		return f.bias(Target{File: file, Tensor: t, Layer: layer, Role: Sink, RowBytes: 4})
	case base == "attn_gate" && kind == "weight" && f.arch.gated:
		return f.weight(Target{File: file, Tensor: t, Layer: layer, Role: f.gate(layer, t), RowBytes: t.RowBytes()})
	case slices.Contains(f.arch.norms, base) && kind == "weight":
		return f.bias(Target{File: file, Tensor: t, Layer: layer, Role: f.normed(base, t), RowBytes: 4})
	case permuted && kind == "weight":
		return f.weight(Target{File: file, Tensor: t, Layer: layer, Role: role, RowBytes: t.RowBytes()})
	case permuted && kind == "bias":
		return f.bias(Target{File: file, Tensor: t, Layer: layer, Role: role, RowBytes: 4})
	case permuted && strings.HasSuffix(kind, "scale") && elements(t) == 1:
		return nil // one factor for the whole tensor
	}
	return enclave.Refuse("tensor %q is not supported by mode permute for this architecture", t.Name)
}

// firstNorms are the first layer's norms that can be a marker.
var firstNorms = []string{"attn_norm.weight", "post_attention_norm.weight", "ffn_norm.weight"}

// consider takes a norm of the first layer as the marker of a model without frequency factors.
func (f *finder) consider(file, layer int, name string, t gguf.Tensor) {
	if f.arch.factors == "" && f.marker == nil && layer == 0 && slices.Contains(firstNorms, name) && t.Type == gguf.F32 && len(t.Dims) == 1 && t.Dims[0] >= markerFloats {
		f.marker = &Marker{file, t}
	}
}

// markerFloats is how many last bits tell two loads apart, at least.
const markerFloats = 32

// normed is what the elements of a norm of queries or keys are: one head's rows, or all heads'.
func (f *finder) normed(base string, t gguf.Tensor) Role {
	switch {
	case elements(t) == int64(f.shape.KeyDim):
		return HeadNorm
	case base == "attn_q_norm":
		return Query
	}
	return Key
}

// gate is what the rows of a gate are: a number for each of the attention output, or one for each query head.
func (f *finder) gate(layer int, t gguf.Tensor) Role {
	if t.Rows() == int64(f.shape.In(layer).Heads) {
		return HeadGate
	}
	return Gate
}

// fused plans a tensor of queries, keys and values, in this order.
func (f *finder) fused(file, layer int, kind string, t gguf.Tensor) error {
	row, first := t.RowBytes(), int64(0)
	if kind == "bias" {
		row = 4
	}
	for _, role := range []Role{Query, Key, Value} {
		heads, rows := f.shape.HeadRows(role, layer)
		f.list = append(f.list, Target{file, t, layer, role, row, first})
		first += int64(heads) * int64(rows)
	}
	have := t.Rows()
	if kind == "bias" {
		have = elements(t)
	} else if err := f.checkWidth(t); err != nil {
		return err
	}
	if have != first || row*first != t.Size || (kind == "bias") != (len(t.Dims) == 1) {
		return enclave.Invalid("tensor %q has dimensions %v, expected %d rows of queries, keys and values", t.Name, t.Dims, first)
	}
	return nil
}

func elements(t gguf.Tensor) int64 {
	n := t.Rows()
	if len(t.Dims) > 0 {
		n *= t.Dims[0]
	}
	return n
}

func (f *finder) weight(t Target) error {
	heads, rows := f.shape.HeadRows(t.Role, t.Layer)
	if len(t.Tensor.Dims) < 2 || t.Tensor.Rows() != int64(heads)*int64(rows) || t.Tensor.Dims[1] != t.Tensor.Rows() {
		return enclave.Invalid("tensor %q has dimensions %v, expected %d rows of %d heads each", t.Tensor.Name, t.Tensor.Dims, rows, heads)
	}
	if err := f.checkWidth(t.Tensor); err != nil {
		return err
	}
	if t.RowBytes < 1 || t.RowBytes*t.Tensor.Rows() != t.Tensor.Size {
		return enclave.Refuse("tensor %q of type %v does not store its rows one by one, so mode permute cannot permute them", t.Tensor.Name, t.Tensor.Type)
	}
	f.list = append(f.list, t)
	return nil
}

// checkWidth makes sure that all queries, keys and values are made from rows of one length.
func (f *finder) checkWidth(t gguf.Tensor) error {
	if len(t.Dims) == 0 {
		return enclave.Invalid("tensor %q has no dimensions", t.Name)
	}
	if f.width == 0 {
		f.width = t.Dims[0]
	}
	if t.Dims[0] != f.width {
		return enclave.Invalid("tensor %q has rows of %d elements, others have %d", t.Name, t.Dims[0], f.width)
	}
	return nil
}

func (f *finder) bias(t Target) error {
	heads, rows := f.shape.HeadRows(t.Role, t.Layer)
	want := int64(heads) * int64(rows)
	if t.Tensor.Type != gguf.F32 || elements(t.Tensor) != want || len(t.Tensor.Dims) == 0 || t.Tensor.Dims[0] != want {
		return enclave.Invalid("tensor %q has type %v and dimensions %v, expected F32 and %d", t.Tensor.Name, t.Tensor.Type, t.Tensor.Dims, want)
	}
	f.list = append(f.list, t)
	return nil
}

// checkOutput makes sure that the attention output has the length that will be inverted.
func (f *finder) checkOutput(layer int, name string, t gguf.Tensor) error {
	if name == "attn_output.weight" && (len(t.Dims) == 0 || t.Dims[0] != int64(f.shape.RowOf(layer))) {
		return enclave.Invalid("tensor %q has dimensions %v, expected rows of %d", t.Name, t.Dims, f.shape.RowOf(layer))
	}
	return nil
}

func (f *finder) checkMarker(t gguf.Tensor) error {
	want := int64(f.shape.RotDim / 2)
	if t.Type != gguf.F32 || len(t.Dims) == 0 || t.Dims[0] != want || elements(t) != want {
		return enclave.Invalid("tensor %q has type %v and dimensions %v, expected F32 and %d", t.Name, t.Type, t.Dims, want)
	}
	return nil
}

// complete makes sure that no layer lacks a tensor that has to be there.
func (f *finder) complete() error {
	for layer := range f.shape.Layers {
		for _, base := range f.required() {
			name := fmt.Sprintf("blk.%d.%s.weight", layer, base)
			_, separate := f.arch.weights[base]
			if separate && f.seen[fmt.Sprintf("blk.%d.attn_qkv.weight", layer)] {
				continue
			}
			if !f.seen[name] {
				return enclave.Invalid("tensor %q is missing: layer %d of %d is incomplete", name, layer, f.shape.Layers)
			}
		}
	}
	return nil
}

func (f *finder) required() []string {
	names := []string{"attn_output"}
	for base := range f.arch.weights {
		names = append(names, base)
	}
	slices.Sort(names)
	return names
}

// place is the model's own marker, or a new one at the end of the first file.
func (f *finder) place() Marker {
	if f.marker != nil {
		return *f.marker
	}
	return Marker{0, gguf.Tensor{Name: f.arch.factors, Type: gguf.F32, Dims: []int64{int64(f.shape.RotDim / 2)}}}
}
