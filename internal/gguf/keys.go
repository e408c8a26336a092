package gguf

import (
	"encoding/binary"
	"io"
	"math"
	"slices"
)

// maxUints bounds the arrays that Uints reads: per-layer values, not vocabularies.
const maxUints = 65536

// Tensor returns the description of the tensor with this name.
func (f *File) Tensor(name string) (Tensor, bool) {
	i, ok := f.byName[name]
	if !ok {
		return Tensor{}, false
	}
	return f.Tensors[i], true
}

// Keys lists the keys in the order of the file.
func (f *File) Keys() []string { return slices.Clone(f.keys) }

// Uint returns an integer of any type. The second result says whether the key is there; a value of
// another type, or below zero, is an error.
func (f *File) Uint(key string) (uint64, bool, error) {
	v, ok := f.values[key]
	if !ok {
		return 0, false, nil
	}
	if !v.kind.integer() {
		return 0, true, v.mismatch(key, "an integer")
	}
	n, ok := v.kind.integerOf(v.bits[:])
	if !ok {
		return 0, true, fail(ErrMalformed, v.pos, "key %.80q is below zero", key)
	}
	return n, true, nil
}

// Float returns a floating-point number of either size.
func (f *File) Float(key string) (float64, bool, error) {
	v, ok := f.values[key]
	if !ok {
		return 0, false, nil
	}
	switch v.kind {
	case kindF32:
		return float64(math.Float32frombits(binary.LittleEndian.Uint32(v.bits[:]))), true, nil
	case kindF64:
		return math.Float64frombits(binary.LittleEndian.Uint64(v.bits[:])), true, nil
	}
	return 0, true, v.mismatch(key, "a floating-point number")
}

// Text returns a string. One that was too long to be kept is an error.
func (f *File) Text(key string) (string, bool, error) {
	v, ok := f.values[key]
	if !ok {
		return "", false, nil
	}
	if v.kind != kindString {
		return "", true, v.mismatch(key, "a string")
	}
	if v.size > keptText {
		return "", true, fail(ErrUnsupported, v.pos, "key %.80q has %d bytes, at most %d are kept", key, v.size, keptText)
	}
	return v.text, true, nil
}

// Bool returns a truth value. Anything but 0 and 1 is an error.
func (f *File) Bool(key string) (bool, bool, error) {
	v, ok := f.values[key]
	if !ok {
		return false, false, nil
	}
	if v.kind != kindBool {
		return false, true, v.mismatch(key, "a bool")
	}
	if v.bits[0] > 1 {
		return false, true, fail(ErrMalformed, v.pos, "key %.80q is a bool of value %d", key, v.bits[0])
	}
	return v.bits[0] == 1, true, nil
}

// Uints returns an array of integers of any type, or a single integer as an array of one. The
// elements are read from r, the file that was parsed.
func (f *File) Uints(r io.ReaderAt, key string) ([]uint64, bool, error) {
	v, ok := f.values[key]
	if !ok {
		return nil, false, nil
	}
	if v.kind != kindArray {
		n, _, err := f.Uint(key)
		if err != nil {
			return nil, true, err
		}
		return []uint64{n}, true, nil
	}
	if !v.elem.integer() {
		return nil, true, v.mismatch(key, "integers")
	}
	if v.count > maxUints {
		return nil, true, fail(ErrUnsupported, v.pos, "key %.80q has %d elements, at most %d are read", key, v.count, maxUints)
	}
	list, err := v.readUints(r)
	return list, true, within(err, "key %.80q", key)
}

func (v value) readUints(r io.ReaderAt) ([]uint64, error) {
	width := v.elem.size()
	raw := make([]byte, v.count*width)
	if n, err := r.ReadAt(raw, v.pos); n < len(raw) {
		return nil, readError(err, v.pos+int64(n))
	}
	list := make([]uint64, v.count)
	for i := range list {
		at := uint64(i) * width
		n, ok := v.elem.integerOf(raw[at:])
		if !ok {
			return nil, fail(ErrMalformed, v.pos+int64(at), "element %d is below zero", i)
		}
		list[i] = n
	}
	return list, nil
}

func (v value) mismatch(key, want string) error {
	got := v.kind.String()
	if v.kind == kindArray {
		got = "array of " + v.elem.String()
	}
	return fail(ErrMalformed, v.pos, "key %.80q has type %s, expected %s", key, got, want)
}
