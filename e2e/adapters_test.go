package e2e

import (
	"encoding/binary"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/internal/gguf"
)

// writeRandom writes a GGUF file with tensors of random numbers.
func writeRandom(t *testing.T, name string, deviation float64, keys map[string]any, tensors map[string][]int64) string {
	t.Helper()
	var b gguf.Builder
	for key, value := range keys {
		b.Key(key, value)
	}
	for name, dims := range tensors {
		b.Tensor(name, gguf.F32, dims, func(w io.Writer) error {
			source, n := rand.New(rand.NewPCG(1, uint64(len(name)))), int64(1)
			for _, d := range dims {
				n *= d
			}
			var buf []byte
			for range n {
				buf = binary.LittleEndian.AppendUint32(buf, math.Float32bits(float32(deviation*source.NormFloat64())))
			}
			_, err := w.Write(buf)
			return err
		})
	}
	path := filepath.Join(t.TempDir(), name)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := b.WriteTo(f); err != nil {
		t.Fatal(err)
	}
	return path
}

// demoDims are the columns and rows of a tensor of the demo model.
func demoDims(t *testing.T, name string) (columns, rows int64) {
	t.Helper()
	r, f, err := gguf.Open(demoModel)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	tensor, ok := f.Tensor(name)
	if !ok {
		t.Fatalf("the demo model has no %s", name)
	}
	return tensor.Dims[0], tensor.Dims[1]
}

// lora is an adapter of rank 4 for one matrix.
func lora(t *testing.T, tensor string, deviation float64) string {
	columns, rows := demoDims(t, tensor)
	return writeRandom(t, "lora.gguf", deviation, map[string]any{"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": float32(4)},
		map[string][]int64{tensor + ".lora_a": {columns, 4}, tensor + ".lora_b": {4, rows}})
}

// Adapters on attention change what the permutation was made for: refused in mode permute, exact in mode resident. What does not touch
// attention is exact in both.
func TestAdapters(t *testing.T) {
	width, _ := demoDims(t, "blk.0.attn_q.weight")
	vector := writeRandom(t, "control.gguf", 1, map[string]any{"general.architecture": "controlvector", "controlvector.model_hint": "llama", "controlvector.layer_count": int32(2)},
		map[string][]int64{"direction.1": {width}, "direction.2": {width}})
	plain := startStock(t, demoModel, nil, exactCache...).completeAll(t, tokens, 1, nil)
	for name, test := range map[string]struct {
		args    []string
		refused string // by mode permute
	}{
		"LoRA on values":         {[]string{"--lora", lora(t, "blk.0.attn_v.weight", 0.1)}, `changes "blk.0.attn_v.weight`},
		"LoRA on a feed-forward": {[]string{"--lora", lora(t, "blk.0.ffn_up.weight", 0.3)}, ""},
		"control vector":         {[]string{"--control-vector", vector}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			args := append(slices.Clone(exactCache), test.args...)
			stock := startStock(t, demoModel, nil, args...)
			want := stock.completeAll(t, tokens, 1, nil)
			if want[0].Content == plain[0].Content && want[1].Content == plain[1].Content {
				t.Fatal("it changes nothing")
			}
			inEachMode(t, func(t *testing.T, mode string) {
				s := launch(t, serveOptions{model: demoModel, mode: mode, args: args})
				s.client.Timeout = patience
				err := s.tryReady()
				if mode == "permute" && test.refused != "" {
					if err == nil || !strings.Contains(s.log.String(), test.refused) {
						t.Errorf("%v\n%s", err, s.log)
					}
					return
				}
				if err != nil {
					t.Fatalf("%v\n%s", err, s.log)
				}
				same(t, want, s.completeAll(t, tokens, 1, nil))
				sameFirstLogits(t, stock, s, 5e-3)
			})
		})
	}
}
