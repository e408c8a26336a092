package play

import (
	"fmt"
	"slices"

	"github.com/kvshield/kvshield/internal/gguf"
)

const valueWeights = "blk.0.attn_v.weight"

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
