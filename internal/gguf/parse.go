package gguf

import (
	"io"
	"math/bits"
	"strings"
)

const (
	magic            = "GGUF"
	alignmentKey     = "general.alignment"
	defaultAlignment = 32
	fixedHeader      = 24 // magic, version, number of tensors, number of keys

	// Far above any model, and low enough that names and descriptions fit into memory.
	maxTensors = 1 << 20
	maxKeys    = 1 << 16
	maxKey     = 1024

	leastTensor = 8 + 1 + 4 + 4 + 8 // bytes of the shortest description
	leastKey    = 8 + 1 + 4 + 1     // bytes of the shortest key and value
)

// File is what the header of a GGUF file says.
type File struct {
	Version    uint32
	Alignment  int64
	DataOffset int64 // where tensor data starts; without tensors, where the header ends
	Size       int64 // of the whole file
	Tensors    []Tensor

	keys      []string
	values    map[string]value
	byName    map[string]int
	keysEnd   int64 // first byte behind the keys and values
	headerEnd int64 // first byte behind the tensor descriptions
}

// Parse reads the header of a file of size bytes and checks all of it. What it finds wrong is an
// [*Error].
func Parse(r io.ReaderAt, size int64) (*File, error) {
	c := newCursor(r, size)
	f := &File{Size: size}
	tensors, keys, err := f.readFixed(c)
	if err != nil {
		return nil, err
	}
	if err := f.readKeys(c, keys); err != nil {
		return nil, err
	}
	if err := f.readAlignment(); err != nil {
		return nil, err
	}
	if err := f.readTensors(c, tensors); err != nil {
		return nil, err
	}
	if err := f.findData(); err != nil {
		return nil, err
	}
	return f, nil
}

func (f *File) readFixed(c *cursor) (tensors, keys uint64, err error) {
	if err := readMagic(c); err != nil {
		return 0, 0, err
	}
	if f.Version, err = readVersion(c); err != nil {
		return 0, 0, err
	}
	if tensors, err = readCount(c, "tensors", leastTensor, maxTensors); err != nil {
		return 0, 0, err
	}
	keys, err = readCount(c, "keys", leastKey, maxKeys)
	return tensors, keys, err
}

func readMagic(c *cursor) error {
	if c.size == 0 {
		return fail(ErrTruncated, 0, "the file is empty")
	}
	b, err := c.peek(int(min(c.left(), uint64(len(magic)))))
	if err != nil {
		return err
	}
	if !strings.HasPrefix(magic, string(b)) {
		return fail(ErrNotGGUF, 0, "it starts with %q", b)
	}
	return within(c.skip(uint64(len(magic))), "magic")
}

func readVersion(c *cursor) (uint32, error) {
	v, err := c.u32()
	if err != nil {
		return 0, within(err, "version")
	}
	if swapped := bits.ReverseBytes32(v); swapped >= 1 && swapped <= 3 {
		return 0, fail(ErrUnsupported, c.pos-4, "version %d in big-endian byte order, only little-endian files are read", swapped)
	}
	if v != 2 && v != 3 {
		return 0, fail(ErrUnsupported, c.pos-4, "version %d, only versions 2 and 3 are read", v)
	}
	return v, nil
}

// readCount refuses a count of things that the rest of the file cannot hold, at least bytes each.
func readCount(c *cursor, what string, least, limit uint64) (uint64, error) {
	n, err := c.u64()
	if err != nil {
		return 0, within(err, "number of %s", what)
	}
	if n > c.left()/least {
		return 0, fail(ErrTruncated, c.pos-8, "%d %s, %d bytes are left in the file", n, what, c.left())
	}
	if n > limit {
		return 0, fail(ErrUnsupported, c.pos-8, "%d %s, at most %d are read", n, what, limit)
	}
	return n, nil
}

func (f *File) readKeys(c *cursor, count uint64) error {
	f.values = make(map[string]value)
	for i := range count {
		key, err := c.text(maxKey)
		if err != nil {
			return within(err, "key %d", i)
		}
		if err := f.checkKey(key, c.pos-int64(len(key))); err != nil {
			return err
		}
		v, err := readValue(c)
		if err != nil {
			return within(err, "key %.80q", key)
		}
		f.keys = append(f.keys, key)
		f.values[key] = v
	}
	f.keysEnd = c.pos
	return nil
}

// checkKey refuses a NUL because engines look keys up as C strings and would find another key.
func (f *File) checkKey(key string, at int64) error {
	if key == "" {
		return fail(ErrMalformed, at, "key %d is empty", len(f.keys))
	}
	if strings.IndexByte(key, 0) >= 0 {
		return fail(ErrMalformed, at, "zero byte in key %.80q", key)
	}
	if _, ok := f.values[key]; ok {
		return fail(ErrMalformed, at, "duplicate key %.80q", key)
	}
	return nil
}

func (f *File) readAlignment() error {
	f.Alignment = defaultAlignment
	v, ok := f.values[alignmentKey]
	if !ok {
		return nil
	}
	if v.kind != kindU32 {
		return fail(ErrMalformed, v.pos, "key %q has type %v, expected u32", alignmentKey, v.kind)
	}
	n, _ := v.kind.integerOf(v.bits[:])
	if bits.OnesCount64(n) != 1 {
		return fail(ErrMalformed, v.pos, "key %q is %d, not a power of two", alignmentKey, n)
	}
	f.Alignment = int64(n)
	return nil
}

func (f *File) readTensors(c *cursor, count uint64) error {
	f.byName = make(map[string]int)
	for i := range count {
		at := c.pos
		t, err := readTensor(c)
		if err != nil {
			return within(err, "tensor %d", i)
		}
		if _, ok := f.byName[t.Name]; ok {
			return fail(ErrMalformed, at, "duplicate tensor %.80q", t.Name)
		}
		f.byName[t.Name] = len(f.Tensors)
		f.Tensors = append(f.Tensors, t)
	}
	f.headerEnd = c.pos
	return nil
}

func readTensor(c *cursor) (Tensor, error) {
	at := c.pos
	name, err := c.text(maxName)
	if err != nil {
		return Tensor{}, err
	}
	t, err := readDescription(c, name)
	if err != nil {
		return t, within(err, "%q", name)
	}
	if t.Size, err = t.measure(); err != nil {
		return t, moved(within(err, "%q", name), at)
	}
	return t, nil
}

func readDescription(c *cursor, name string) (Tensor, error) {
	t := Tensor{Name: name}
	dims, err := c.u32()
	if err != nil {
		return t, err
	}
	if dims > maxDims {
		return t, fail(ErrMalformed, c.pos-4, "%d dimensions, at most %d are possible", dims, maxDims)
	}
	t.Dims = make([]int64, dims)
	for i := range t.Dims {
		n, err := c.u64()
		if err != nil {
			return t, err
		}
		t.Dims[i] = int64(n)
	}
	id, err := c.u32()
	if err != nil {
		return t, err
	}
	t.Type = Type(id)
	offset, err := c.u64()
	if err == nil && offset > uint64(c.size) {
		return t, fail(ErrTruncated, c.pos-8, "offset %d is past the end of the file", offset)
	}
	t.Offset = int64(offset)
	return t, err
}

// findData checks that the tensors lie behind the header, inside the file, one after the other.
func (f *File) findData() error {
	if len(f.Tensors) == 0 {
		f.DataOffset = f.headerEnd
		return nil
	}
	var ok bool
	if f.DataOffset, ok = pad(f.headerEnd, f.Alignment); !ok {
		return fail(ErrMalformed, f.headerEnd, "no room for data aligned to %d", f.Alignment)
	}
	err := checkPlaces(f.Tensors, f.Alignment, f.Size-f.DataOffset)
	return moved(err, f.headerEnd)
}

// moved gives an error that knows no place in the file the place of its tensor.
func moved(err error, offset int64) error {
	if e, ok := err.(*Error); ok {
		return &Error{Offset: offset, What: e.What, Err: e.Err}
	}
	return err
}
