package gguf

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
)

// WriteHeader writes the header of a new file that has f's keys and the given tensors, padded up to
// where data starts if there is any, and returns that place. Keys and values are copied from src, the file that f
// was parsed from, byte for byte, except the integers named in patch. The tensors must be placed as
// [Place] does it.
func WriteHeader(w io.Writer, src io.ReaderAt, f *File, tensors []Tensor, patch map[string]uint64) (dataOffset int64, err error) {
	return writeHeader(w, src, f, tensors, patch, -1)
}

const (
	paddingKey = "kvshield.padding"
	// PageMax is a multiple of every page size that Linux has, HugePage one of the large pages in which it maps a large
	// file that is cached.
	PageMax  = 64 << 10
	HugePage = 2 << 20
	// emptyPadding is what the padding key takes besides its text: name, type and length.
	emptyPadding = 8 + int64(len(paddingKey)) + 4 + 8
)

// WriteHeaderInPlace is WriteHeader with a padding key added, so that the data lies at the same place within a page of the
// given size as in f: what is unchanged of it can be mapped from there. Where an alignment beyond a page or a padding
// key in f forbids that, there is none.
func WriteHeaderInPlace(w io.Writer, src io.ReaderAt, f *File, tensors []Tensor, patch map[string]uint64, page int64) (dataOffset int64, err error) {
	if _, taken := f.values[paddingKey]; taken || page%f.Alignment != 0 {
		return WriteHeader(w, src, f, tensors, patch)
	}
	end := f.keysEnd + emptyPadding
	for _, t := range tensors {
		end += 8 + int64(len(t.Name)) + 4 + 8*int64(len(t.Dims)) + 4 + 8
	}
	return writeHeader(w, src, f, tensors, patch, ((f.DataOffset-end)%page+page)%page)
}

// writeHeader adds a padding key with a text of the given length, unless that is negative.
func writeHeader(w io.Writer, src io.ReaderAt, f *File, tensors []Tensor, patch map[string]uint64, padding int64) (dataOffset int64, err error) {
	if err := checkTensors(tensors, f.Alignment); err != nil {
		return 0, err
	}
	patches, err := f.patches(patch)
	if err != nil {
		return 0, err
	}
	out := &writer{w: bufio.NewWriterSize(w, window)}
	out.bytes([]byte(magic))
	out.u32(f.Version)
	out.u64(uint64(len(tensors)))
	if padding < 0 {
		out.u64(uint64(len(f.keys)))
		out.copyPatched(src, fixedHeader, f.keysEnd, patches)
	} else {
		out.u64(uint64(len(f.keys) + 1))
		out.copyPatched(src, fixedHeader, f.keysEnd, patches)
		out.text(paddingKey)
		out.u32(uint32(kindString))
		out.text(strings.Repeat(" ", int(padding)))
	}
	return out.tensors(tensors, f.Alignment)
}

func checkTensors(tensors []Tensor, alignment int64) error {
	seen := make(map[string]bool, len(tensors))
	for _, t := range tensors {
		size, err := t.measure()
		if err != nil {
			return within(err, "tensor %.80q", t.Name)
		}
		if size != t.Size {
			return fail(ErrMalformed, 0, "tensor %.80q: size is %d, its dimensions make it %d", t.Name, t.Size, size)
		}
		if seen[t.Name] {
			return fail(ErrMalformed, 0, "duplicate tensor %.80q", t.Name)
		}
		seen[t.Name] = true
	}
	return checkPlaces(tensors, alignment, math.MaxInt64)
}

// change is a run of bytes that differs from the source.
type change struct {
	pos   int64
	bytes []byte
}

func (f *File) patches(patch map[string]uint64) ([]change, error) {
	list := make([]change, 0, len(patch))
	for _, key := range slices.Sorted(maps.Keys(patch)) {
		n := patch[key]
		v, ok := f.values[key]
		switch {
		case !ok:
			return nil, fail(ErrMalformed, 0, "no key %.80q to patch", key)
		case !v.kind.integer():
			return nil, v.mismatch(key, "an integer to patch")
		case !v.kind.fits(n):
			return nil, fail(ErrMalformed, v.pos, "key %.80q has type %v, %d does not fit", key, v.kind, n)
		case key == alignmentKey:
			return nil, fail(ErrUnsupported, v.pos, "key %q cannot be patched, the tensors are placed by it", key)
		}
		word := binary.LittleEndian.AppendUint64(nil, n)
		list = append(list, change{v.pos, word[:v.kind.size()]})
	}
	slices.SortFunc(list, func(a, b change) int { return cmp.Compare(a.pos, b.pos) })
	return list, nil
}

// writer counts what it writes and keeps the first error.
type writer struct {
	w   *bufio.Writer
	n   int64
	err error
}

func (o *writer) bytes(b []byte) {
	if o.err == nil {
		var n int
		n, o.err = o.w.Write(b)
		o.n += int64(n)
	}
}

func (o *writer) u32(n uint32) { o.bytes(binary.LittleEndian.AppendUint32(nil, n)) }

func (o *writer) u64(n uint64) { o.bytes(binary.LittleEndian.AppendUint64(nil, n)) }

func (o *writer) text(s string) {
	o.u64(uint64(len(s)))
	o.bytes([]byte(s))
}

func (o *writer) copyPatched(src io.ReaderAt, from, to int64, patches []change) {
	for _, p := range patches {
		o.copy(src, from, p.pos)
		o.bytes(p.bytes)
		from = p.pos + int64(len(p.bytes))
	}
	o.copy(src, from, to)
}

func (o *writer) copy(src io.ReaderAt, from, to int64) {
	if o.err != nil {
		return
	}
	in := &reader{Reader: io.NewSectionReader(src, from, to-from)}
	n, err := io.Copy(o.w, in)
	o.n += n
	switch {
	case in.err != nil || (err == nil && n < to-from):
		o.err = readError(in.err, from+n)
	case err != nil:
		o.err = err
	}
}

// reader remembers that it was the reading that failed.
type reader struct {
	io.Reader
	err error
}

func (r *reader) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

// tensors writes the descriptions and the padding behind them, and everything out.
func (o *writer) tensors(tensors []Tensor, alignment int64) (int64, error) {
	for _, t := range tensors {
		o.text(t.Name)
		o.u32(uint32(len(t.Dims)))
		for _, n := range t.Dims {
			o.u64(uint64(n))
		}
		o.u32(uint32(t.Type))
		o.u64(uint64(t.Offset))
	}
	if len(tensors) > 0 {
		o.pad(alignment)
	}
	if o.err == nil {
		o.err = o.w.Flush()
	}
	return o.n, o.err
}

func (o *writer) pad(alignment int64) {
	end, _ := pad(o.n, alignment)
	zeros := make([]byte, min(end-o.n, window))
	for o.err == nil && o.n < end {
		o.bytes(zeros[:min(end-o.n, window)])
	}
}
