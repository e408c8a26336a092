package gguf

import (
	"math"
	"strings"
)

const (
	maxName = 63 // ggml keeps 64 bytes, the last of them zero
	maxDims = 4
)

// Tensor describes one tensor of a file.
type Tensor struct {
	Name   string
	Dims   []int64 // in ggml's order: Dims[0] is the length of a row; none means a single element
	Type   Type
	Offset int64 // from File.DataOffset
	Size   int64 // bytes, without the padding behind it
}

// RowBytes is the size of one row, or 0 when the type is unknown.
func (t Tensor) RowBytes() int64 {
	elements, bytes, ok := t.Type.Block()
	if !ok {
		return 0
	}
	return t.rowLength() / elements * bytes
}

// Rows is the number of rows.
func (t Tensor) Rows() int64 {
	rows := int64(1)
	for i := 1; i < len(t.Dims); i++ {
		rows *= t.Dims[i]
	}
	return rows
}

func (t Tensor) rowLength() int64 {
	if len(t.Dims) == 0 {
		return 1
	}
	return t.Dims[0]
}

// measure checks name, dimensions and type, and returns the size in bytes.
func (t Tensor) measure() (int64, error) {
	if err := checkName(t.Name); err != nil {
		return 0, err
	}
	if len(t.Dims) > maxDims {
		return 0, fail(ErrMalformed, 0, "%d dimensions, at most %d are possible", len(t.Dims), maxDims)
	}
	elements, bytes, ok := t.Type.Block()
	if !ok {
		return 0, fail(ErrUnsupported, 0, "tensor type %d is unknown or was removed from the format", uint32(t.Type))
	}
	for i, n := range t.Dims {
		if n <= 0 {
			return 0, fail(ErrMalformed, 0, "dimension %d is %d", i, n)
		}
	}
	if t.rowLength()%elements != 0 {
		return 0, fail(ErrMalformed, 0, "rows of %d elements are no multiple of the %d in a block of %v",
			t.rowLength(), elements, t.Type)
	}
	return t.product(t.rowLength()/elements, bytes)
}

func (t Tensor) product(blocksInRow, bytes int64) (int64, error) {
	factors := []int64{bytes}
	if len(t.Dims) > 1 {
		factors = append(factors, t.Dims[1:]...)
	}
	size := blocksInRow
	for _, n := range factors {
		if size > math.MaxInt64/n {
			return 0, fail(ErrMalformed, 0, "size of dimensions %v overflows", t.Dims)
		}
		size *= n
	}
	// Engines count elements in 64 bits too, and a block may hold more elements than bytes.
	if elements, _, _ := t.Type.Block(); size/bytes > math.MaxInt64/elements {
		return 0, fail(ErrMalformed, 0, "size of dimensions %v overflows", t.Dims)
	}
	return size, nil
}

// checkName refuses a NUL too: engines stop reading a name there and would see another tensor.
func checkName(name string) error {
	switch {
	case name == "":
		return fail(ErrMalformed, 0, "tensor without a name")
	case len(name) > maxName:
		return fail(ErrMalformed, 0, "name of %d bytes is too long, at most %d are possible", len(name), maxName)
	case strings.IndexByte(name, 0) >= 0:
		return fail(ErrMalformed, 0, "zero byte in its name")
	}
	return nil
}

// Place sets Size and Offset of every tensor so that they follow one another, and returns the size
// of the data section, padding behind the last tensor included.
func Place(tensors []Tensor, alignment int64) (int64, error) {
	end := int64(0)
	for i := range tensors {
		t := &tensors[i]
		size, err := t.measure()
		if err != nil {
			return 0, within(err, "tensor %.80q", t.Name)
		}
		t.Offset, t.Size = end, size
		if end, err = next(t, alignment, math.MaxInt64); err != nil {
			return 0, err
		}
	}
	return end, nil
}

// checkPlaces asks for the layout that engines ask for: one after the other, in order.
func checkPlaces(tensors []Tensor, alignment, room int64) error {
	want := int64(0)
	for i := range tensors {
		t := &tensors[i]
		if err := checkOffset(t, alignment, want); err != nil {
			return err
		}
		var err error
		if want, err = next(t, alignment, room); err != nil {
			return err
		}
	}
	return nil
}

func checkOffset(t *Tensor, alignment, want int64) error {
	switch {
	case t.Offset%alignment != 0:
		return fail(ErrMalformed, 0, "tensor %.80q: offset %d is not aligned to %d", t.Name, t.Offset, alignment)
	case t.Offset < want:
		return fail(ErrMalformed, 0, "tensor %.80q: offset %d overlaps or precedes an earlier tensor, expected %d",
			t.Name, t.Offset, want)
	case t.Offset > want:
		return fail(ErrMalformed, 0, "tensor %.80q: offset %d leaves a gap, expected %d", t.Name, t.Offset, want)
	}
	return nil
}

// next is where the tensor behind t has to start. room is the size of the data section.
func next(t *Tensor, alignment, room int64) (int64, error) {
	if t.Size > room-t.Offset {
		return 0, fail(ErrTruncated, 0, "tensor %.80q: %d bytes at offset %d run past the end of the file, which has %d bytes of data",
			t.Name, t.Size, t.Offset, max(room, 0))
	}
	end, ok := pad(t.Offset+t.Size, alignment)
	if !ok {
		return 0, fail(ErrMalformed, 0, "tensor %.80q: sizes of the tensors together overflow", t.Name)
	}
	return end, nil
}

// pad rounds n up to a multiple of alignment, a power of two.
func pad(n, alignment int64) (int64, bool) {
	if n > math.MaxInt64-(alignment-1) {
		return 0, false
	}
	return (n + alignment - 1) &^ (alignment - 1), true
}
