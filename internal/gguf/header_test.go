package gguf_test

import (
	"bytes"
	"errors"
	"io"
	"math"
	"slices"
	"testing"

	"github.com/kvshield/kvshield/internal/gguf"
)

func TestWriteHeaderRepeatsTheHeader(t *testing.T) {
	data := small(t)
	f := parse(t, data)
	var out bytes.Buffer
	at, err := gguf.WriteHeader(&out, bytes.NewReader(data), f, f.Tensors, nil)
	if err != nil {
		t.Fatal(err)
	}
	if at != f.DataOffset || !bytes.Equal(out.Bytes(), data[:at]) {
		t.Errorf("other header of %d bytes, data at %d, expected at %d", out.Len(), at, f.DataOffset)
	}
}

func TestWriteHeaderPatchesAndAddsTensors(t *testing.T) {
	data := small(t)
	f := parse(t, data)
	tensors := append(slices.Clone(f.Tensors), gguf.Tensor{Name: "rope_freqs.weight", Dims: []int64{16}, Type: gguf.F32})
	size, err := gguf.Place(tensors, f.Alignment)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	patch := map[string]uint64{"u8": 255, "i64": 1 << 62, "u32": 99}
	at, err := gguf.WriteHeader(&out, bytes.NewReader(data), f, tensors, patch)
	if err != nil {
		t.Fatal(err)
	}
	g, err := gguf.Parse(filled{out.Bytes(), at + size}, at+size)
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]uint64{"u8": 255, "u16": 16, "u32": 99, "i32": 32, "i64": 1 << 62, "u64": 1 << 63} {
		if got, _, err := g.Uint(key); got != want || err != nil {
			t.Errorf("%s: got %d, %v", key, got, err)
		}
	}
	added, ok := g.Tensor("rope_freqs.weight")
	if !ok || added.Size != 64 || added.Offset != tensors[3].Offset || !slices.Equal(g.Keys(), f.Keys()) {
		t.Errorf("got %v, keys %v", added, g.Keys())
	}
}

func TestWriteHeaderRefuses(t *testing.T) {
	data := small(t)
	f := parse(t, data)
	aligned := parse(t, alignment(32).Bytes())
	changed := func(change func(*gguf.Tensor)) []gguf.Tensor {
		list := slices.Clone(f.Tensors)
		change(&list[1])
		return list
	}
	for _, c := range []struct {
		name    string
		file    *gguf.File
		tensors []gguf.Tensor
		patch   map[string]uint64
		kind    error
		says    string
	}{
		{"absent key", f, f.Tensors, map[string]uint64{"absent": 1}, gguf.ErrMalformed, `no key "absent"`},
		{"text", f, f.Tensors, map[string]uint64{"long": 1}, gguf.ErrMalformed, "type string"},
		{"array", f, f.Tensors, map[string]uint64{"per layer": 1}, gguf.ErrMalformed, "array of u32"},
		{"too large", f, f.Tensors, map[string]uint64{"u8": 256}, gguf.ErrMalformed, "256 does not fit"},
		{"too large for a sign", f, f.Tensors, map[string]uint64{"i8": 128}, gguf.ErrMalformed, "128 does not fit"},
		{"too large for 64 bits", f, f.Tensors, map[string]uint64{"i64": math.MaxUint64}, gguf.ErrMalformed, "does not fit"},
		{"alignment", aligned, aligned.Tensors, map[string]uint64{"general.alignment": 64}, gguf.ErrUnsupported, "cannot be patched"},
		{"duplicate", f, changed(func(t *gguf.Tensor) { t.Name = "first" }), nil, gguf.ErrMalformed, `duplicate tensor "first"`},
		{"moved", f, changed(func(t *gguf.Tensor) { t.Offset += 32 }), nil, gguf.ErrMalformed, "leaves a gap"},
		{"overlap", f, changed(func(t *gguf.Tensor) { t.Offset = 0 }), nil, gguf.ErrMalformed, "overlaps"},
		{"other size", f, changed(func(t *gguf.Tensor) { t.Size++ }), nil, gguf.ErrMalformed, "size is 137"},
		{"negative dimension", f, changed(func(t *gguf.Tensor) { t.Dims = []int64{-32} }), nil, gguf.ErrMalformed, "dimension 0 is -32"},
	} {
		var out bytes.Buffer
		_, err := gguf.WriteHeader(&out, bytes.NewReader(data), c.file, c.tensors, c.patch)
		checkSays(t, c.name, err, c.kind, c.says)
		if out.Len() != 0 {
			t.Errorf("%s: %d bytes written before the refusal", c.name, out.Len())
		}
	}
}

func TestWriteHeaderReportsFailedReadsAndWrites(t *testing.T) {
	data := small(t)
	f := parse(t, data)
	reason := errors.New("the disk is gone")
	if _, err := gguf.WriteHeader(io.Discard, broken{reason}, f, f.Tensors, nil); !errors.Is(err, reason) {
		t.Errorf("failed read: got %v", err)
	}
	_, err := gguf.WriteHeader(io.Discard, bytes.NewReader(data[:200]), f, f.Tensors, nil)
	checkSays(t, "shrunk", err, gguf.ErrTruncated, "ends earlier")
	if _, err := gguf.WriteHeader(full{reason}, bytes.NewReader(data), f, f.Tensors, nil); !errors.Is(err, reason) {
		t.Errorf("failed write: got %v", err)
	}
}

type full struct{ err error }

func (f full) Write([]byte) (int, error) { return 0, f.err }

func TestBuilderRefuses(t *testing.T) {
	short := func(w io.Writer) error { return fill(1, 4)(w) }
	for _, c := range []struct {
		name string
		make func(*gguf.Builder)
		says string
	}{
		{"unknown value", func(b *gguf.Builder) { b.Key("k", 1) }, "a value of type int"},
		{"duplicate key", func(b *gguf.Builder) { b.Key("k", true); b.Key("k", true) }, "duplicate key"},
		{"empty key", func(b *gguf.Builder) { b.Key("", true) }, "key 0 is empty"},
		{"alignment", func(b *gguf.Builder) { b.Key("general.alignment", uint32(3)) }, "power of two"},
		{"duplicate tensor", func(b *gguf.Builder) {
			b.Tensor("w", gguf.F32, nil, nil)
			b.Tensor("w", gguf.F32, nil, nil)
		}, "duplicate tensor"},
		{"partial block", func(b *gguf.Builder) { b.Tensor("w", gguf.Q8_0, []int64{33}, nil) }, "33 elements"},
		{"too little data", func(b *gguf.Builder) { b.Tensor("w", gguf.F32, []int64{2}, short) }, "4 bytes written, it has 8"},
		{"data that fails", func(b *gguf.Builder) {
			b.Tensor("w", gguf.F32, nil, func(io.Writer) error { return io.ErrClosedPipe })
		}, `tensor "w": io: read/write on closed pipe`},
	} {
		var b gguf.Builder
		c.make(&b)
		_, err := b.WriteTo(io.Discard)
		if err == nil {
			t.Errorf("%s: accepted", c.name)
			continue
		}
		checkSays(t, c.name, err, err, c.says)
	}
}

func TestBuilderHonoursAlignment(t *testing.T) {
	var b gguf.Builder
	b.Key("general.alignment", uint32(128))
	b.Tensor("a", gguf.F32, []int64{1}, fill(1, 4))
	b.Tensor("b", gguf.F32, []int64{1}, nil)
	var out bytes.Buffer
	n, err := b.WriteTo(&out)
	if err != nil || n != int64(out.Len()) {
		t.Fatalf("%d bytes said, %d written, %v", n, out.Len(), err)
	}
	f := parse(t, out.Bytes())
	if f.Alignment != 128 || f.DataOffset%128 != 0 || f.Tensors[1].Offset != 128 {
		t.Errorf("got alignment %d, data at %d, %v", f.Alignment, f.DataOffset, f.Tensors)
	}
	if size, err := b.Size(); size != 256 || err != nil || f.DataOffset+size != n {
		t.Errorf("data of %d bytes, %v", size, err)
	}
}
