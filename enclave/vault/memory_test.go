package vault

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/internal/gguf"
)

// sparse is a file writer that leaves holes where zeros would go.
type sparse struct{ *os.File }

func (s sparse) Write(b []byte) (int, error) {
	if len(bytes.Trim(b, "\x00")) > 0 {
		return s.File.Write(b)
	}
	_, err := s.Seek(int64(len(b)), io.SeekCurrent)
	return len(b), err
}

// large writes a model of about half a gigabyte, of which almost nothing is on the disk. Its heads
// are as large as the buffers get.
func large(t *testing.T) string {
	t.Helper()
	s := sample{layers: 1, heads: 16, kv: 1, dim: 128, values: 128, rot: 128, width: 16384, base: 10000, files: 1}
	var b gguf.Builder
	s.keys(&b, 0, 0)
	add := func(name string, dims ...int64) { b.Tensor("blk.0."+name+".weight", gguf.F16, dims, nil) }
	add("attn_q", 16384, 16*128)
	add("attn_k", 16384, 128)
	add("attn_v", 16384, 128)
	add("attn_output", 16*128, 16384)
	add("ffn_up", 16384, 12000)
	path := filepath.Join(t.TempDir(), "large.gguf")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := b.WriteTo(sparse{f})
	if err == nil {
		err = f.Truncate(n)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Everything that Load allocates counts, so the figure bounds the peak whenever garbage is collected.
func TestMemoryCeiling(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 72 MiB")
	}
	path, to := large(t), emptyFiles(t, 1)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	res, err := New(Options{}).Load(t.Context(), enclave.LoadRequest{Sources: []string{path}, Outputs: to})
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if res.Bytes < 500<<20 || res.ShieldBytes < 70<<20 {
		t.Fatalf("the model has %d bytes, %d to shield: too small for this test", res.Bytes, res.ShieldBytes)
	}
	const ceiling = 40 << 20
	if used := after.TotalAlloc - before.TotalAlloc; used > ceiling {
		t.Errorf("Load allocated %d bytes, at most %d are allowed", used, ceiling)
	}
}

// Run it with -fuzzminimizetime 5x: workers that race make coverage differ from run to run, and the
// default spends a minute on shrinking every input that looks new.
func FuzzLoad(f *testing.F) {
	for i, s := range []sample{standard, with(func(s *sample) { s.own, s.bias, s.layers, s.kind = true, true, 1, gguf.Q8_0 })} {
		raw, err := os.ReadFile(s.build(f, uint64(i))[0])
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		path := filepath.Join(t.TempDir(), "m.gguf")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		// One key for all inputs: coverage must depend on the input alone.
		v, to := New(Options{Random: repeat{}}), emptyFiles(t, 1)
		res, err := v.Load(t.Context(), enclave.LoadRequest{Sources: []string{path}, Outputs: to})
		if err != nil || res.Action == enclave.Pass {
			if info, _ := os.Stat(to[0]); info.Size() != 0 {
				t.Errorf("%d bytes are left in the output: %v", info.Size(), err)
			}
			return
		}
		for _, c := range res.Copies {
			doCopy(t, c, path, to[0])
		}
		if _, ok := contents(t, to)[res.Marker]; !ok {
			t.Error("the shielded model has no frequency factors")
		}
		src, dst := make([]float32, res.RowFloats), make([]float32, res.RowFloats)
		for layer := range res.Layers {
			if err := v.Invert(res.ID, layer, dst, src); err != nil {
				t.Error(fmt.Errorf("layer %d: %w", layer, err))
			}
		}
	})
}
