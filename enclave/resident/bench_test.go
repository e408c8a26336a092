package resident

import (
	"fmt"
	"testing"

	"github.com/kvshield/kvshield/enclave"
)

// BenchmarkDecode is one token of a 1.1B model (16 layers, 32 query heads over 8 KV heads, d = 64): Begin and every layer's Attend.
func BenchmarkDecode(b *testing.B) {
	for _, depth := range []int{256, 1024, 4096} {
		for _, threads := range []int{1, 2} {
			b.Run(fmt.Sprintf("depth=%d/threads=%d", depth, threads), func(b *testing.B) { benchmark(b, depth, 1, threads) })
		}
	}
}

// BenchmarkPrefill is a batch of 512 tokens.
func BenchmarkPrefill(b *testing.B) {
	for _, depth := range []int{512, 4096} {
		b.Run(fmt.Sprintf("depth=%d/threads=2", depth), func(b *testing.B) { benchmark(b, depth, 512, 2) })
	}
}

func benchmark(b *testing.B, depth, tokens, threads int) {
	layer := enclave.LayerCache{QueryHeads: 32, KVHeads: 8, DimK: 64, DimV: 64, Cells: depth, Streams: 1}
	layers := make([]enclave.LayerCache, 16)
	for i := range layers {
		layers[i] = layer
	}
	s := keeper(b, Options{Limit: 1 << 31, Threads: threads}).OpenStore(noModels)
	first := declare(b, s, layers...)
	batch := &enclave.Batch{Tokens: tokens, Blocks: 1, Mask: enclave.MaskF16, MaskCells: depth, MaskRows: (tokens + 63) / 64 * 64}
	batch.MaskData = make([]byte, 2*batch.MaskRows*depth)
	a := &enclave.Attention{Scale: 0.125, PutCount: tokens, QueryCount: tokens}
	a.K, a.V = ones(tokens*8*64), ones(tokens*8*64)
	a.Q, a.Out = ones(tokens*32*64), make([]float32, tokens*32*64)
	step := func(query int) {
		if err := s.Begin(0, batch); err != nil {
			b.Fatal(err)
		}
		a.QueryCount, a.Q, a.Out = query, a.Q[:query*32*64], a.Out[:query*32*64]
		for i := range layers {
			if err := s.Attend(first+enclave.CacheID(i), a); err != nil {
				b.Fatal(err)
			}
		}
	}
	for cell := 0; cell < depth; cell += tokens {
		batch.Cells = batch.Cells[:0]
		for i := range tokens {
			batch.Cells = append(batch.Cells, int64(cell+i))
		}
		step(0)
	}
	b.ReportAllocs()
	for b.Loop() {
		step(tokens)
	}
}

func ones(n int) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(i%17) / 16
	}
	return x
}
