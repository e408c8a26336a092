package gguf_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/internal/gguf"
)

// raw writes the pieces of a file without checking any of them.
type raw struct{ bytes.Buffer }

func (r *raw) u32(n uint32) *raw {
	r.Write(binary.LittleEndian.AppendUint32(nil, n))
	return r
}

func (r *raw) u64(n uint64) *raw {
	r.Write(binary.LittleEndian.AppendUint64(nil, n))
	return r
}

func (r *raw) str(s string) *raw {
	r.u64(uint64(len(s)))
	r.WriteString(s)
	return r
}

func (r *raw) zeros(n int) *raw {
	r.Write(make([]byte, n))
	return r
}

func (r *raw) pad() *raw { return r.zeros((32 - r.Len()%32) % 32) }

func head(tensors, keys uint64) *raw {
	r := &raw{}
	r.WriteString("GGUF")
	return r.u32(3).u64(tensors).u64(keys)
}

// tensor describes one tensor.
func (r *raw) tensor(name string, kind gguf.Type, offset uint64, dims ...uint64) *raw {
	r.str(name).u32(uint32(len(dims)))
	for _, n := range dims {
		r.u64(n)
	}
	return r.u32(uint32(kind)).u64(offset)
}

// filled reads zeros behind its bytes, so that a test does not carry tensor data around.
type filled struct {
	header []byte
	size   int64
}

func (f filled) ReadAt(b []byte, at int64) (int, error) {
	if at >= f.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(b)), f.size-at))
	clear(b[:n])
	if at < int64(len(f.header)) {
		copy(b[:n], f.header[at:])
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// small is a valid file with a value of every type.
func small(t testing.TB) []byte {
	t.Helper()
	var b gguf.Builder
	b.Key("general.architecture", "llama")
	b.Key("u8", uint8(8))
	b.Key("i8", int8(-8))
	b.Key("u16", uint16(16))
	b.Key("i16", int16(1600))
	b.Key("u32", uint32(32))
	b.Key("i32", int32(32))
	b.Key("u64", uint64(1)<<63)
	b.Key("i64", int64(-64))
	b.Key("f32", float32(0.5))
	b.Key("f64", 0.25)
	b.Key("yes", true)
	b.Key("long", strings.Repeat("x", 5000))
	b.Key("pieces", []string{"a", "", "ccc"})
	b.Key("per layer", []uint32{4, 8, 4})
	b.Key("small layer", []int16{4, 8, -1})
	b.Key("scores", []float32{1, 2})
	b.Tensor("first", gguf.F32, []int64{3}, fill(1, 12))
	b.Tensor("second", gguf.Q8_0, []int64{64, 2}, fill(2, 136))
	b.Tensor("scalar", gguf.F16, nil, fill(3, 2))
	var out bytes.Buffer
	if _, err := b.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func fill(b byte, n int) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := w.Write(bytes.Repeat([]byte{b}, n))
		return err
	}
}

func parse(t testing.TB, data []byte) *gguf.File {
	t.Helper()
	f, err := gguf.Parse(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	return f
}
