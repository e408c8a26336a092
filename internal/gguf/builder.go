package gguf

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// Builder collects keys and tensors of a new file, version 3. The zero value is ready. What is wrong
// with a key or a tensor is reported by WriteTo.
type Builder struct {
	keys    []string
	values  []any
	tensors []Tensor
	data    []func(io.Writer) error
}

// Key adds a key. value is an integer of a fixed size, a float32 or float64, a bool, a string, or a
// slice of these.
func (b *Builder) Key(key string, value any) {
	b.keys = append(b.keys, key)
	b.values = append(b.values, value)
}

// Tensor adds a tensor. data writes its bytes when the file is written; nil writes zeros.
func (b *Builder) Tensor(name string, t Type, dims []int64, data func(io.Writer) error) {
	b.tensors = append(b.tensors, Tensor{Name: name, Type: t, Dims: slices.Clone(dims)})
	b.data = append(b.data, data)
}

// Size is how much tensor data WriteTo will write, padding included.
func (b *Builder) Size() (int64, error) {
	alignment, err := b.alignment()
	if err != nil {
		return 0, err
	}
	return Place(b.tensors, alignment)
}

// WriteTo writes the file.
func (b *Builder) WriteTo(w io.Writer) (int64, error) {
	alignment, err := b.check()
	if err != nil {
		return 0, err
	}
	out := &writer{w: bufio.NewWriterSize(w, window)}
	out.bytes([]byte(magic))
	out.u32(3)
	out.u64(uint64(len(b.tensors)))
	out.u64(uint64(len(b.keys)))
	for i, key := range b.keys {
		out.text(key)
		out.value(b.values[i])
	}
	if _, err := out.tensors(b.tensors, alignment); err != nil {
		return out.n, err
	}
	for i, t := range b.tensors {
		out.data(t, b.data[i])
		out.pad(alignment)
	}
	if out.err == nil {
		out.err = out.w.Flush()
	}
	return out.n, out.err
}

func (b *Builder) check() (alignment int64, err error) {
	f := &File{values: make(map[string]value)}
	for i, key := range b.keys {
		if err := f.checkKey(key, 0); err != nil {
			return 0, err
		}
		if len(key) > maxKey {
			return 0, fail(ErrMalformed, 0, "key %.80q is too long, at most %d bytes are possible", key, maxKey)
		}
		if kindOf(b.values[i]) == kindArray && elementKind(b.values[i]) == kindArray {
			return 0, fail(ErrUnsupported, 0, "key %.80q: a value of type %T", key, b.values[i])
		}
		f.keys, f.values[key] = append(f.keys, key), value{}
	}
	if alignment, err = b.alignment(); err != nil {
		return 0, err
	}
	if _, err := Place(b.tensors, alignment); err != nil {
		return 0, err
	}
	return alignment, checkTensors(b.tensors, alignment)
}

func (b *Builder) alignment() (int64, error) {
	i := slices.Index(b.keys, alignmentKey)
	if i < 0 {
		return defaultAlignment, nil
	}
	n, ok := b.values[i].(uint32)
	if !ok || n == 0 || n&(n-1) != 0 {
		return 0, fail(ErrMalformed, 0, "key %q is %v, expected a uint32 power of two", alignmentKey, b.values[i])
	}
	return int64(n), nil
}

// kindOf is kindArray for everything that is no single value.
func kindOf(v any) kind {
	switch v.(type) {
	case uint8:
		return kindU8
	case int8:
		return kindI8
	case uint16:
		return kindU16
	case int16:
		return kindI16
	case uint32:
		return kindU32
	case int32:
		return kindI32
	case float32:
		return kindF32
	case bool:
		return kindBool
	case string:
		return kindString
	case uint64:
		return kindU64
	case int64:
		return kindI64
	case float64:
		return kindF64
	}
	return kindArray
}

// elementKind is kindArray for what is no slice of single values.
func elementKind(v any) kind {
	switch v.(type) {
	case []uint8:
		return kindU8
	case []int8:
		return kindI8
	case []uint16:
		return kindU16
	case []int16:
		return kindI16
	case []uint32:
		return kindU32
	case []int32:
		return kindI32
	case []float32:
		return kindF32
	case []bool:
		return kindBool
	case []string:
		return kindString
	case []uint64:
		return kindU64
	case []int64:
		return kindI64
	case []float64:
		return kindF64
	}
	return kindArray
}

func (o *writer) value(v any) {
	k := kindOf(v)
	o.u32(uint32(k))
	switch k {
	case kindString:
		o.text(v.(string))
	case kindArray:
		o.array(v)
	default:
		o.fixed(v)
	}
}

func (o *writer) array(v any) {
	o.u32(uint32(elementKind(v)))
	if list, ok := v.([]string); ok {
		o.u64(uint64(len(list)))
		for _, s := range list {
			o.text(s)
		}
		return
	}
	o.u64(uint64(binary.Size(v)) / elementKind(v).size())
	o.fixed(v)
}

func (o *writer) fixed(v any) {
	b, err := binary.Append(nil, binary.LittleEndian, v)
	if err != nil && o.err == nil {
		o.err = err
	}
	o.bytes(b)
}

// data writes one tensor and makes sure that it has its size.
func (o *writer) data(t Tensor, write func(io.Writer) error) {
	if o.err != nil {
		return
	}
	if write == nil {
		write = func(w io.Writer) error { return writeZeros(w, t.Size) }
	}
	before := o.n
	err := write(counted{o})
	switch {
	case o.err != nil:
	case err != nil:
		o.err = fmt.Errorf("tensor %q: %w", t.Name, err)
	case o.n-before != t.Size:
		o.err = fail(ErrMalformed, before, "tensor %.80q: %d bytes written, it has %d", t.Name, o.n-before, t.Size)
	}
}

func writeZeros(w io.Writer, n int64) error {
	zeros := make([]byte, min(n, window))
	for ; n > 0; n -= int64(len(zeros)) {
		zeros = zeros[:min(n, window)]
		if _, err := w.Write(zeros); err != nil {
			return err
		}
	}
	return nil
}

// counted lets a tensor's data be written through a writer.
type counted struct{ o *writer }

func (c counted) Write(b []byte) (int, error) {
	c.o.bytes(b)
	if c.o.err != nil {
		return 0, c.o.err
	}
	return len(b), nil
}
