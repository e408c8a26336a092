package gguf_test

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/internal/gguf"
)

const demo = "../../examples/model/demo.gguf"

func TestParseDescribesTensors(t *testing.T) {
	data := small(t)
	f := parse(t, data)
	want := []gguf.Tensor{
		{Name: "first", Dims: []int64{3}, Type: gguf.F32, Offset: 0, Size: 12},
		{Name: "second", Dims: []int64{64, 2}, Type: gguf.Q8_0, Offset: 32, Size: 136},
		{Name: "scalar", Dims: []int64{}, Type: gguf.F16, Offset: 192, Size: 2},
	}
	if !reflect.DeepEqual(f.Tensors, want) {
		t.Errorf("got %v", f.Tensors)
	}
	if f.Version != 3 || f.Alignment != 32 || f.DataOffset%32 != 0 || f.Size != int64(len(data)) {
		t.Errorf("got version %d, alignment %d, data at %d, size %d", f.Version, f.Alignment, f.DataOffset, f.Size)
	}
	for i, tensor := range f.Tensors {
		at := f.DataOffset + tensor.Offset
		if !bytes.Equal(data[at:at+tensor.Size], bytes.Repeat([]byte{byte(i + 1)}, int(tensor.Size))) {
			t.Errorf("%s: other data at %d", tensor.Name, at)
		}
		if got, ok := f.Tensor(tensor.Name); !ok || got.Offset != tensor.Offset {
			t.Errorf("Tensor(%q) gives %v, %v", tensor.Name, got, ok)
		}
	}
	if _, ok := f.Tensor("third"); ok {
		t.Error("found a tensor that is not there")
	}
}

func TestTensorRows(t *testing.T) {
	for _, c := range []struct {
		tensor         gguf.Tensor
		rowBytes, rows int64
	}{
		{gguf.Tensor{Type: gguf.F16}, 2, 1},
		{gguf.Tensor{Type: gguf.F32, Dims: []int64{5}}, 20, 1},
		{gguf.Tensor{Type: gguf.Q8_0, Dims: []int64{64, 3}}, 68, 3},
		{gguf.Tensor{Type: gguf.Q4_K, Dims: []int64{512, 3, 2, 5}}, 288, 30},
		{gguf.Tensor{Type: 4, Dims: []int64{64, 3}}, 0, 3},
	} {
		if got := c.tensor.RowBytes(); got != c.rowBytes {
			t.Errorf("%v: rows of %d bytes, expected %d", c.tensor, got, c.rowBytes)
		}
		if got := c.tensor.Rows(); got != c.rows {
			t.Errorf("%v: %d rows, expected %d", c.tensor, got, c.rows)
		}
	}
}

func TestTypes(t *testing.T) {
	removed := []gguf.Type{4, 5, 31, 32, 33, 36, 37, 38, 43, 1 << 31}
	names := map[string]bool{}
	for id := range gguf.Type(43) {
		elements, bytes, ok := id.Block()
		if ok == slices.Contains(removed, id) {
			t.Errorf("type %d: known is %v", id, ok)
		}
		if !ok {
			continue
		}
		if bits := float64(8*bytes) / float64(elements); bits < 1 || bits > 64 {
			t.Errorf("%v: %v bits for each element", id, bits)
		}
		names[id.String()] = true
	}
	if len(names) != 35 {
		t.Errorf("%d different names, expected 35", len(names))
	}
	for _, id := range removed {
		if _, _, ok := id.Block(); ok || !strings.HasPrefix(id.String(), "type ") {
			t.Errorf("type %d is known as %v", uint32(id), id)
		}
	}
	if gguf.MXFP4 != 39 || gguf.IQ2_XXS.String() != "IQ2_XXS" {
		t.Error("numbers and names do not belong together")
	}
}

func TestParseReadsVersion2(t *testing.T) {
	data := small(t)
	data[4] = 2
	if f := parse(t, data); f.Version != 2 || len(f.Tensors) != 3 {
		t.Errorf("got version %d, %d tensors", f.Version, len(f.Tensors))
	}
}

func TestParseReadsFileWithoutTensors(t *testing.T) {
	r := head(0, 1).str("split.count").u32(2)
	r.Write([]byte{2, 0})
	f := parse(t, r.Bytes())
	if n, ok, err := f.Uint("split.count"); n != 2 || !ok || err != nil {
		t.Errorf("got %d, %v, %v", n, ok, err)
	}
	if f.DataOffset != f.Size || len(f.Tensors) != 0 {
		t.Errorf("data at %d of %d, %d tensors", f.DataOffset, f.Size, len(f.Tensors))
	}
}

// The vocabulary of a large model is many windows long, with strings across every border.
func TestParseReadsLongArrays(t *testing.T) {
	words := make([]string, 50000)
	for i := range words {
		words[i] = strings.Repeat("w", i%23)
	}
	words[777] = strings.Repeat("w", 200<<10)
	var b gguf.Builder
	b.Key("words", words)
	b.Key("behind", uint32(7))
	b.Tensor("w", gguf.F32, []int64{1}, nil)
	var out bytes.Buffer
	if _, err := b.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	f := parse(t, out.Bytes())
	if n, ok, err := f.Uint("behind"); n != 7 || !ok || err != nil {
		t.Errorf("got %d, %v, %v", n, ok, err)
	}
}

func TestUints(t *testing.T) {
	data := small(t)
	f := parse(t, data)
	for _, c := range []struct {
		key  string
		want []uint64
		ok   bool
		says string
	}{
		{"per layer", []uint64{4, 8, 4}, true, ""},
		{"u16", []uint64{16}, true, ""},
		{"absent", nil, false, ""},
		{"small layer", nil, true, `key "small layer": element 2 is below zero`},
		{"scores", nil, true, "array of f32, expected integers"},
		{"pieces", nil, true, "array of string, expected integers"},
		{"f32", nil, true, "type f32, expected an integer"},
	} {
		got, ok, err := f.Uints(bytes.NewReader(data), c.key)
		if !slices.Equal(got, c.want) || ok != c.ok {
			t.Errorf("%s: got %v, %v", c.key, got, ok)
		}
		checkSays(t, c.key, err, gguf.ErrMalformed, c.says)
	}
	_, _, err := f.Uints(bytes.NewReader(data[:64]), "per layer")
	checkSays(t, "shrunk", err, gguf.ErrTruncated, `key "per layer": the file ends earlier`)
}

func TestUintsBoundsWhatItReads(t *testing.T) {
	f := parse(t, key().u32(9).u32(0).u64(65537).zeros(65537).Bytes())
	_, ok, err := f.Uints(broken{errors.New("read")}, "k")
	if !ok {
		t.Error("not found")
	}
	checkSays(t, "k", err, gguf.ErrUnsupported, "65537 elements")
}

func checkSays(t *testing.T, name string, err, kind error, says string) {
	t.Helper()
	switch {
	case says == "" && err != nil:
		t.Errorf("%s: %v", name, err)
	case says != "" && (!errors.Is(err, kind) || !strings.Contains(err.Error(), says)):
		t.Errorf("%s: got %v, expected it to say %q", name, err, says)
	}
}

func TestScalars(t *testing.T) {
	f := parse(t, small(t))
	uint := func(k string) (any, bool, error) { return ask(f.Uint(k)) }
	float := func(k string) (any, bool, error) { return ask(f.Float(k)) }
	text := func(k string) (any, bool, error) { return ask(f.Text(k)) }
	truth := func(k string) (any, bool, error) { return ask(f.Bool(k)) }
	for _, c := range []struct {
		key  string
		get  func(string) (any, bool, error)
		want any
		says string
	}{
		{"u8", uint, uint64(8), ""}, {"u16", uint, uint64(16), ""}, {"i16", uint, uint64(1600), ""},
		{"u32", uint, uint64(32), ""}, {"i32", uint, uint64(32), ""}, {"u64", uint, uint64(1) << 63, ""},
		{"i8", uint, nil, `"i8" is below zero`}, {"i64", uint, nil, `"i64" is below zero`},
		{"f32", uint, nil, "type f32, expected an integer"}, {"yes", uint, nil, "type bool"},
		{"per layer", uint, nil, "array of u32, expected an integer"},
		{"f32", float, 0.5, ""}, {"f64", float, 0.25, ""}, {"u8", float, nil, "type u8, expected a floating-point number"},
		{"general.architecture", text, "llama", ""}, {"u8", text, nil, "type u8, expected a string"},
		{"yes", truth, true, ""}, {"u8", truth, nil, "type u8, expected a bool"},
	} {
		got, ok, err := c.get(c.key)
		if !ok {
			t.Errorf("%s: not found", c.key)
		}
		if c.says == "" && got != c.want {
			t.Errorf("%s: got %v", c.key, got)
		}
		checkSays(t, c.key, err, gguf.ErrMalformed, c.says)
	}
	for _, get := range []func(string) (any, bool, error){uint, float, text, truth} {
		if _, ok, err := get("absent"); ok || err != nil {
			t.Errorf("absent: got %v, %v", ok, err)
		}
	}
	_, _, err := f.Text("long")
	checkSays(t, "long", err, gguf.ErrUnsupported, "5000 bytes")
}

func ask[T any](v T, ok bool, err error) (any, bool, error) { return v, ok, err }

func TestBoolRefusesOtherValues(t *testing.T) {
	r := key().u32(7)
	r.WriteByte(2)
	_, _, err := parse(t, r.Bytes()).Bool("k")
	checkSays(t, "k", err, gguf.ErrMalformed, "bool of value 2")
}

func TestKeysAreInTheOrderOfTheFile(t *testing.T) {
	f := parse(t, head(0, 2).str("z").u32(0).zeros(1).str("a").u32(0).zeros(1).Bytes())
	if got := f.Keys(); !slices.Equal(got, []string{"z", "a"}) {
		t.Errorf("got %v", got)
	}
}

func TestOpenReadsTheDemoModel(t *testing.T) {
	r, f, err := gguf.Open(demo)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if name, _, err := f.Text("general.architecture"); name != "llama" || err != nil {
		t.Errorf("architecture %q, %v", name, err)
	}
	if _, ok := f.Tensor("blk.0.attn_output.weight"); !ok {
		t.Error("no attention output")
	}
	if _, err := r.ReadAt(make([]byte, 1), f.Size); !errors.Is(err, io.EOF) {
		t.Errorf("something behind the end: %v", err)
	}
}
