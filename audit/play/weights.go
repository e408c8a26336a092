package play

import (
	"fmt"
	"slices"

	"github.com/kvshield/kvshield/audit/live"
	"github.com/kvshield/kvshield/audit/slotfile"
	"github.com/kvshield/kvshield/internal/gguf"
)

// valueWeights are the tensors that hold layer 0's value matrix: all of one, or the last rows of the other.
var valueWeights = []string{"blk.0.attn_v.weight", "blk.0.attn_qkv.weight"}

// valueRows cuts a tensor into its rows and keeps those of the values; nil when it has fewer.
func valueRows(data []byte, rows int64, s slotfile.Shape) [][]byte {
	n := s.HeadsKV * s.HeadDim
	if rows < int64(n) || int64(len(data)) < rows {
		return nil
	}
	all := slices.Collect(slices.Chunk(data, len(data)/int(rows)))
	return all[len(all)-n:]
}

// publicWeights are the value matrix's rows in the model's file, byte by byte; nil when layer 0 has none.
func publicWeights(path string, s slotfile.Shape) ([][]byte, error) {
	r, f, err := gguf.Open(path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	for _, name := range valueWeights {
		t, ok := f.Tensor(name)
		if !ok || t.RowBytes() == 0 {
			continue
		}
		data := make([]byte, t.Size)
		if _, err := r.ReadAt(data, f.DataOffset+t.Offset); err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", name, err)
		}
		return valueRows(data, t.Rows(), s), nil
	}
	return nil, nil
}

// dumpedWeights are the same rows as they lay in the engine's memory.
func dumpedWeights(d *live.Dump, s slotfile.Shape) [][]byte {
	for _, w := range d.Weights {
		if slices.Contains(valueWeights, w.Name) && len(w.Data) > 0 {
			return valueRows(w.Data, w.Dims[1], s)
		}
	}
	return nil
}
