// Package slotfile reads the files into which a llama-server saves a slot (POST /slots/N?action=save): the state format of one
// sequence, as llama.cpp 0.7.0 writes it.
//
// Start with [Read]. All numbers are little-endian; u32 and u64 are unsigned, of 4 and 8 bytes:
//
//	magic u32, the bytes "qsgg"; version u32, 4
//	words u32, then that many words of 4 bytes: either token ids, or −1, 1, the number of tokens, their ids, and the
//	   number of media chunks, which must be 0
//	streams u32: 1, or with --kv-unified off as many as the server has slots; for each stream its cells u32, and when there are
//	   any, which is so in the saved slot's own stream only, what follows
//	for each cell its position u32, the number of its sequences u32, which is 1, and the number of that sequence u32
//	transposed u32, 1 when values are stored by dimension (flash attention off); layers u32
//	two u32, the block sizes of a Hadamard rotation of keys and of values, 0 for none
//	for each layer its keys: type u32 (of ggml), bytes of a row u64, a row for each cell
//	for each layer its values likewise; transposed: type u32, bytes of an element u32, dimensions u32, a row of cells for each
//	   dimension
//
// Cells lie in any order (a context shift leaves them so); the rows of a snapshot are sorted by position. Rotated caches are turned
// back. Numbers are taken as they stand: a hostile file may hold infinities.
//
// Limits: one sequence, one cache (a model with sliding windows has two), elements F32, F16, BF16 or Q8_0, positions of one
// dimension. Promises: hostile input yields an error, and memory stays within a small multiple of the file.
package slotfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/audit/element"
	"github.com/kvshield/kvshield/internal/gguf"
)

// What is wrong with a file, as errors.Is tells.
var (
	ErrNotSlotFile = errors.New("not a slot file")
	ErrTruncated   = errors.New("slot file ends too early")
	ErrUnsupported = errors.New("slot file of a kind that is not understood")
	ErrMalformed   = errors.New("malformed slot file")
	// ErrEmpty is an error because an attack on nothing would report that nothing was recovered.
	ErrEmpty = errors.New("slot file without a single token")
)

const (
	magic    = 0x67677371
	version  = 4
	packed   = -1 // first word of a token list with a header of its own
	maxCells = 1 << 24
	maxSeqs  = 256 // LLAMA_MAX_SEQ
)

// Shape is what a slot file does not tell.
type Shape struct {
	Layers, HeadsKV int
	HeadDim         int // used for a sealed file only, whose rows are unknown
	// Sliding says which layers have a window, and so a cache of their own behind the others'; nil when none has. The engine must
	// have kept all tokens in it (llama-server --swa-full).
	Sliding []bool
}

// caches lists the layers of each cache, in the order of the file.
func (s Shape) caches() [][]int {
	var full, sliding []int
	for i := range s.Layers {
		if i < len(s.Sliding) && s.Sliding[i] {
			sliding = append(sliding, i)
		} else {
			full = append(full, i)
		}
	}
	if s.Sliding == nil {
		return [][]int{full}
	}
	return [][]int{full, sliding}
}

// File is what a slot file holds.
type File struct {
	// Tokens are the token ids, which the file carries in clear: a leak of its own, kept apart so that no attack sees them.
	Tokens   []int32
	Snapshot *audit.Snapshot
	// RotatedK and RotatedV are the block sizes of the Hadamard rotation that the snapshot's keys and values were taken out of.
	RotatedK, RotatedV int
	// Sealed is the length of a file that an enclave sealed; its snapshot is the ciphertext. 0 for any other.
	Sealed int
}

// Read parses the file at path. Of a file that is no slot file it reads the first bytes only.
func Read(path string, shape Shape) (*File, error) {
	b, err := readAll(path)
	if err != nil {
		return nil, err
	}
	f, err := Parse(b, shape)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

func readAll(path string) ([]byte, error) {
	// Opening a pipe would wait for a writer.
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w: it is no regular file", path, ErrNotSlotFile)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	head := make([]byte, 8)
	n, err := io.ReadFull(file, head)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, err
	}
	if err := checkHead(head[:n]); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return os.ReadFile(path)
}

// checkHead looks at the first bytes of a file.
func checkHead(b []byte) error {
	if len(b) < 8 || binary.LittleEndian.Uint32(b) != magic {
		return fmt.Errorf("%w: it does not begin with its magic number; save one with POST /slots/0?action=save", ErrNotSlotFile)
	}
	if v := binary.LittleEndian.Uint32(b[4:]); v != version {
		return fmt.Errorf("%w: version %d, this reader knows %d; save it with llama.cpp 0.7.0", ErrUnsupported, v, version)
	}
	return nil
}

// Parse parses a whole file.
func Parse(b []byte, shape Shape) (*File, error) {
	if err := checkHead(b); err != nil {
		return nil, err
	}
	r := &reader{b: b, at: 8}
	f := &File{Tokens: r.tokens()}
	if shape.Layers < 1 {
		r.fail(ErrUnsupported, "a model of %d layers", shape.Layers)
	}
	for _, layers := range shape.caches() {
		r.merge(f, layers, shape.Layers, r.streams(f, shape, layers))
	}
	if r.err == nil && r.at != len(b) {
		r.fail(ErrUnsupported, "%d bytes follow the caches of %d layers; name the right model", len(b)-r.at, shape.Layers)
	}
	if r.err == nil && f.Snapshot == nil {
		r.fail(ErrEmpty, "no stream has a cell; ask for a completion before saving the slot")
	}
	if r.err != nil {
		return nil, r.err
	}
	return f, nil
}

// reader keeps the first error; after it every read gives zero.
type reader struct {
	b   []byte
	at  int
	err error
}

func (r *reader) fail(kind error, format string, a ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: at byte %d: %s", kind, r.at, fmt.Sprintf(format, a...))
	}
}

// take returns the next n bytes, nil when there are not so many.
func (r *reader) take(n uint64) []byte {
	if r.err != nil {
		return nil
	}
	if n > uint64(len(r.b)-r.at) {
		r.fail(ErrTruncated, "%d bytes are missing; save the slot again", n-uint64(len(r.b)-r.at))
		return nil
	}
	out := r.b[r.at : r.at+int(n)]
	r.at += int(n)
	return out
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if b := r.take(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

func (r *reader) tokens() []int32 {
	raw := r.take(4 * uint64(r.u32()))
	words := make([]int32, len(raw)/4)
	for i := range words {
		words[i] = int32(binary.LittleEndian.Uint32(raw[4*i:]))
	}
	if len(words) == 0 || words[0] != packed {
		return words
	}
	switch {
	case len(words) < 4 || words[1] != 1:
		r.fail(ErrUnsupported, "a token list of another version")
	case words[2] < 0 || int64(words[2]) > int64(len(words)-4):
		r.fail(ErrMalformed, "%d tokens in a list of %d words", words[2], len(words))
	case words[3+words[2]] != 0:
		r.fail(ErrUnsupported, "the conversation holds images or sound")
	default:
		return words[3 : 3+words[2]]
	}
	return nil
}

// merge puts a cache's layers where they belong among all.
func (r *reader) merge(f *File, layers []int, all int, s *audit.Snapshot) {
	if r.err != nil || s == nil {
		return
	}
	if f.Snapshot == nil {
		whole := *s
		whole.Layers = make([]audit.Layer, all)
		f.Snapshot = &whole
	}
	if len(f.Snapshot.Positions) != len(s.Positions) {
		r.fail(ErrUnsupported, "layers with a window hold %d tokens, others %d; run the engine with --swa-full", len(s.Positions), len(f.Snapshot.Positions))
		return
	}
	if len(layers) > 0 {
		f.Snapshot.Positions, f.Snapshot.Type = s.Positions, s.Type // sorted, as the rows are
	}
	for i, l := range layers {
		f.Snapshot.Layers[l] = s.Layers[i]
	}
}

// streams reads all streams of one cache, of which one may hold cells.
func (r *reader) streams(f *File, shape Shape, layers []int) (s *audit.Snapshot) {
	n := r.u32()
	if r.err == nil && (n < 1 || n > maxSeqs) {
		r.fail(ErrMalformed, "%d streams", n)
	}
	for i := uint32(0); i < n && r.err == nil; i++ {
		switch cells := r.u32(); {
		case cells == 0:
		case s != nil:
			r.fail(ErrUnsupported, "a second stream with cells; save one slot")
		default:
			s = r.state(f, shape.HeadsKV, len(layers), r.cells(cells))
		}
	}
	return s
}

// cells reads the positions of n cells, in the order of the cells.
func (r *reader) cells(n uint32) []int32 {
	if r.err == nil && (n > maxCells || uint64(n)*12 > uint64(len(r.b)-r.at)) {
		r.fail(ErrTruncated, "%d cells do not fit; save the slot again", n)
	}
	if r.err != nil {
		return nil
	}
	positions := make([]int32, n)
	for i := range positions {
		positions[i] = int32(r.u32())
		sequences, sequence := r.u32(), r.u32()
		switch {
		case sequences != 1 || sequence >= maxSeqs:
			r.fail(ErrUnsupported, "cell %d belongs to %d sequences; models with positions of several dimensions are not understood", i, sequences)
			return nil
		case positions[i] < 0:
			r.fail(ErrMalformed, "cell %d has position %d", i, positions[i])
			return nil
		}
	}
	return positions
}

// state reads what a stream's cells hold, and sorts it by position.
func (r *reader) state(f *File, headsKV, want int, positions []int32) *audit.Snapshot {
	transposed, layers := r.u32(), r.u32()
	rotatedK, rotatedV := r.u32(), r.u32()
	switch {
	case r.err != nil:
		return nil
	case transposed > 1:
		r.fail(ErrMalformed, "the flag for transposed values is %d", transposed)
	case int64(layers) != int64(want) || headsKV < 1:
		r.fail(ErrUnsupported, "a cache of %d layers where the model has %d of %d heads; name the right model: one with recurrent layers or windows of its own kind is not understood",
			layers, want, headsKV)
	}
	f.RotatedK, f.RotatedV = int(rotatedK), int(rotatedV)
	s := &audit.Snapshot{Source: audit.SlotFile, HeadsKV: headsKV, Positions: positions}
	for range want {
		if r.err != nil {
			return nil
		}
		k, kind := r.matrix(len(positions), rotatedK)
		s.Layers, s.Type = append(s.Layers, audit.Layer{K: k}), kind
	}
	kind := s.Type
	for i := range s.Layers {
		if transposed == 1 {
			s.Layers[i].V, kind = r.transposed(len(positions), rotatedV)
		} else {
			s.Layers[i].V, kind = r.matrix(len(positions), rotatedV)
		}
	}
	if kind != s.Type {
		s.Type += " keys, " + kind + " values"
	}
	if r.err != nil {
		return nil
	}
	if want == 0 {
		return s // a cache of layers that the model does not have
	}
	err := s.Check()
	if err == nil {
		err = sortRows(s)
	}
	if err != nil {
		r.fail(ErrMalformed, "%v", err)
	}
	return s
}

// matrix reads type, bytes of a row, and rows.
func (r *reader) matrix(rows int, rotated uint32) (audit.Matrix, string) {
	t, size := gguf.Type(r.u32()), r.u64()
	elements, bytes, known := t.Block()
	switch {
	case r.err != nil:
		return audit.Matrix{}, ""
	case !known || !element.Known(t):
		r.fail(ErrUnsupported, "elements of type %v; use a cache of F32, F16, BF16 or Q8_0", t)
	case size == 0 || size%uint64(bytes) != 0 || size > math.MaxInt32:
		r.fail(ErrMalformed, "rows of %d bytes of type %v", size, t)
	}
	raw := r.take(size * uint64(rows)) // both below 2³¹
	if r.err != nil {
		return audit.Matrix{}, ""
	}
	m := audit.NewMatrix(rows, int(size)/int(bytes)*int(elements))
	element.Floats(m.Data, t, raw)
	r.unrotate(m, rotated)
	return m, t.String()
}

// transposed reads type, bytes of an element, number of dimensions, and a row of cells for each.
func (r *reader) transposed(cells int, rotated uint32) (audit.Matrix, string) {
	t, size, dims := gguf.Type(r.u32()), r.u32(), r.u32()
	elements, bytes, known := t.Block()
	switch {
	case r.err != nil:
		return audit.Matrix{}, ""
	case !known || !element.Known(t) || elements != 1:
		r.fail(ErrUnsupported, "transposed values of type %v", t)
	case uint64(size) != uint64(bytes) || dims == 0 || dims > maxCells:
		r.fail(ErrMalformed, "%d dimensions of %d bytes of type %v", dims, size, t)
	}
	raw := r.take(uint64(size) * uint64(dims) * uint64(cells)) // below 2²·2²⁴·2²⁴
	if r.err != nil {
		return audit.Matrix{}, ""
	}
	flat := make([]float32, int(dims)*cells)
	element.Floats(flat, t, raw)
	m := audit.NewMatrix(cells, int(dims))
	for d := range int(dims) {
		for c := range cells {
			m.Data[c*m.Cols+d] = flat[d*cells+c]
		}
	}
	r.unrotate(m, rotated)
	return m, t.String()
}

// unrotate takes back the Hadamard rotation that engines apply to quantised caches: its matrix is public, and its own inverse.
func (r *reader) unrotate(m audit.Matrix, block uint32) {
	switch {
	case block == 0:
		return
	case block&(block-1) != 0 || int64(block) > int64(m.Cols) || m.Cols%int(block) != 0:
		r.fail(ErrMalformed, "a rotation of blocks of %d in rows of %d", block, m.Cols)
		return
	}
	element.Unrotate(m.Data, int(block))
}
