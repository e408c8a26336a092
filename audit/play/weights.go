package play

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/kvshield/kvshield/internal/gguf"
)

const (
	valueWeights = "blk.0.attn_v.weight"
	scanAlign    = 32      // of tensors, in every backend of ggml
	scanBlock    = 8 << 20 // read at once
)

// publicWeights are the value matrix's rows in the model's file, byte by byte; nil when layer 0 has none of its own.
func publicWeights(path string) ([][]byte, error) {
	r, f, err := gguf.Open(path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	t, ok := f.Tensor(valueWeights)
	if !ok || t.RowBytes() == 0 {
		return nil, nil
	}
	data := make([]byte, t.Size)
	if _, err := r.ReadAt(data, f.DataOffset+t.Offset); err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", valueWeights, err)
	}
	return slices.Collect(slices.Chunk(data, int(t.RowBytes()))), nil
}

// weightsInMemory looks through an engine's memory, without knowing where anything lies, for a matrix of which every row is a
// row of the public one. It prefers one in another order. Nil: there is none, as on a device with memory of its own.
func weightsInMemory(ctx context.Context, pid int, public [][]byte) ([][]byte, error) {
	if len(public) == 0 || len(public[0]) < 8 {
		return nil, nil
	}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, fmt.Errorf("cannot read the engine's memory: %w; kernel.yama.ptrace_scope must be 0 or 1", err)
	}
	defer memory.Close()
	s := newRowScanner(memory, public)
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		if _, err := fmt.Sscanf(line, "%x-%x", &from, &to); err != nil {
			continue // vsyscall, above what a file offset can say
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if s.scan(from, to); s.shuffled {
			break
		}
	}
	return s.found, nil
}

// rowScanner finds the public rows by their first bytes, then compares.
type rowScanner struct {
	memory   io.ReaderAt
	public   [][]byte
	known    map[string]bool
	begins   map[uint64]bool
	found    [][]byte
	shuffled bool // found in another order than the public one
}

func newRowScanner(memory io.ReaderAt, public [][]byte) *rowScanner {
	s := &rowScanner{memory: memory, public: public, known: map[string]bool{}, begins: map[uint64]bool{}}
	for _, row := range public {
		s.known[string(row)] = true
		s.begins[binary.LittleEndian.Uint64(row)] = true
	}
	return s
}

func (s *rowScanner) scan(from, to int64) {
	block := make([]byte, min(scanBlock, to-from))
	for at := from; at < to && !s.shuffled; at += scanBlock {
		n, _ := s.memory.ReadAt(block[:min(int64(len(block)), to-at)], at)
		for i := 0; i+8 <= n; i += scanAlign {
			if s.begins[binary.LittleEndian.Uint64(block[i:])] {
				s.consider(at + int64(i))
			}
		}
	}
}

// consider looks whether a whole matrix begins here.
func (s *rowScanner) consider(at int64) {
	size := len(s.public[0])
	data := make([]byte, size*len(s.public))
	if _, err := s.memory.ReadAt(data, at); err != nil {
		return
	}
	rows := slices.Collect(slices.Chunk(data, size))
	moved := 0
	for i, row := range rows {
		if !s.known[string(row)] {
			return
		}
		if string(row) != string(s.public[i]) {
			moved++
		}
	}
	if s.found == nil || moved > 0 {
		s.found, s.shuffled = rows, moved > 0
	}
}
