package main

import (
	"context"
	"encoding/binary"
	"flag"
	"math"
	"os"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/internal/gguf"
	"github.com/kvshield/kvshield/plugin"
)

type fake struct{}

func (fake) Inspect(ctx context.Context, s []string) (enclave.Model, error) {
	f, g, err := gguf.Open(s[0])
	if err != nil {
		return enclave.Model{}, enclave.Invalid("%v", err)
	}
	defer f.Close()
	l, _, _ := g.Uint("llama.block_count")
	h, _, _ := g.Uint("llama.attention.head_count")
	e, _, _ := g.Uint("llama.embedding_length")
	return enclave.Model{Action: enclave.Shield, Layers: int(l), Heads: int(h), HeadDim: int(e / h), RowFloats: int(e), Bytes: g.Size}, nil
}
func (k fake) Load(ctx context.Context, r enclave.LoadRequest) (enclave.LoadResult, error) {
	m, _ := k.Inspect(ctx, r.Sources)
	f, g, _ := gguf.Open(r.Sources[0])
	defer f.Close()
	out, err := os.OpenFile(r.Outputs[0], os.O_RDWR, 0)
	if err != nil {
		return enclave.LoadResult{}, err
	}
	defer out.Close()
	data := g.Size - g.DataOffset
	pad := (data + 31) / 32 * 32
	n := int64(m.HeadDim / 2)
	ts := append(append([]gguf.Tensor{}, g.Tensors...), gguf.Tensor{Name: "rope_freqs.weight", Dims: []int64{n}, Type: gguf.F32, Offset: pad, Size: n * 4})
	off, err := gguf.WriteHeader(out, f, g, ts, nil)
	if err != nil {
		return enclave.LoadResult{}, err
	}
	var b []byte
	for range n {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(1))
	}
	out.WriteAt(b, off+pad)
	return enclave.LoadResult{ID: 7, Model: m, Fingerprint: b, Marker: "rope_freqs.weight", Copies: []enclave.Copy{{0, g.DataOffset, off, data}}, OutputSizes: []int64{off + pad + n*4}}, nil
}
func (fake) Unload(ctx context.Context, id enclave.ModelID) error { return nil }
func (fake) Invert(id enclave.ModelID, layer int, dst, src []float32) error {
	copy(dst, src)
	return nil
}
func (fake) Attest(ctx context.Context, nonce []byte) (enclave.Report, error) {
	return enclave.Report{Backend: "none"}, nil
}
func main() {
	flag.String("tee", "", "")
	d := flag.String("runtime-dir", "", "")
	flag.Parse()
	if err := plugin.Serve(plugin.Implementation{fake{}, fake{}, fake{}}, *d); err != nil { panic(err) }
}
