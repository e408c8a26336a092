package attention

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"unsafe"
)

// A model of the size that people run: 16 layers of 32 query heads over 8 KV heads, head dimension 64.
var benchShape = Shape{QueryHeads: 32, KVHeads: 8, DimK: 64, DimV: 64}

const benchLayers = 16

func benchCaches(b *testing.B, k *kernel, s Shape, cells int) []*Cache {
	b.Helper()
	l := newLayer(s, 1, 64, 1)
	caches := make([]*Cache, benchLayers)
	for i := range caches {
		c, err := newCache(s, cells, k)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(c.Close)
		for cell := range cells {
			if err := c.Put(int64(cell), l.k[cell%64], l.v[cell%64]); err != nil {
				b.Fatal(err)
			}
		}
		caches[i] = c
	}
	return caches
}

// benchAttend times one token's (or batch's) way through all layers.
func benchAttend(b *testing.B, k *kernel, s Shape, tokens, cells, threads int) {
	caches := benchCaches(b, k, s, cells)
	l := newLayer(s, tokens, cells, 2)
	l.causal(0)
	m := l.bytes(MaskF16, cells)
	pool := NewPool(threads)
	defer pool.Close()
	l.params.Pool = pool
	out := make([]float32, tokens*s.QueryHeads*s.DimV)
	for b.Loop() {
		for _, c := range caches {
			if err := Attend(out, l.q, c, m, l.params); err != nil {
				b.Fatal(err)
			}
		}
	}
	keys, values := s.panelBytes()
	perOp := b.Elapsed().Seconds() / float64(b.N)
	read := float64(benchLayers * s.KVHeads * cells / panelCells * (keys + values))
	flops := 2 * float64(benchLayers*s.QueryHeads*(s.DimK+s.DimV)) * float64(tokens) * (float64(cells) - float64(tokens-1)/2)
	b.ReportMetric(read/perOp/1e9, "GB/s")
	b.ReportMetric(flops/perOp/1e9, "GFLOP/s")
}

func BenchmarkDecode(b *testing.B) {
	for _, storage := range []Storage{F16, Q8_0, F32} {
		for _, cells := range []int{512, 2048, 8192} {
			for _, threads := range []int{1, 2} {
				b.Run(fmt.Sprintf("%v/%d/threads=%d", storage, cells, threads), func(b *testing.B) {
					s := benchShape
					s.Type = storage
					benchAttend(b, best(), s, 1, cells, threads)
				})
			}
		}
	}
}

func BenchmarkPrefill512(b *testing.B) {
	for _, cells := range []int{512, 2048, 8192} {
		for _, threads := range []int{1, 2} {
			b.Run(fmt.Sprintf("%v/%d/threads=%d", F16, cells, threads), func(b *testing.B) {
				benchAttend(b, best(), benchShape, 512, cells, threads)
			})
		}
	}
}

// What each level of instructions is worth, at 512 positions.
func BenchmarkLevels(b *testing.B) {
	for _, k := range kernels() {
		for _, tokens := range []int{1, 64} {
			b.Run(fmt.Sprintf("%s/%d tokens", k.name, tokens), func(b *testing.B) {
				benchAttend(b, k, benchShape, tokens, 512, 1)
			})
		}
	}
}

// What decoding with one KV head gains from a second thread comes from splitting the cells.
func BenchmarkDecodeOneKVHead(b *testing.B) {
	for _, threads := range []int{1, 2} {
		b.Run(fmt.Sprintf("threads=%d", threads), func(b *testing.B) {
			benchAttend(b, best(), Shape{QueryHeads: 8, KVHeads: 1, DimK: 128, DimV: 128}, 1, 8192, threads)
		})
	}
}

func BenchmarkPut(b *testing.B) {
	for _, storage := range []Storage{F16, Q8_0, F32} {
		b.Run(storage.String(), func(b *testing.B) {
			s := benchShape
			s.Type = storage
			caches := benchCaches(b, best(), s, 2048)
			l := newLayer(s, 1, 1, 3)
			cell := 0
			for b.Loop() {
				for _, c := range caches {
					if err := c.Put(int64(cell%2048), l.k[0], l.v[0]); err != nil {
						b.Fatal(err)
					}
				}
				cell++
			}
		})
	}
}

// BenchmarkBandwidth is the bound: how fast one thread reads memory that is in no cache.
func BenchmarkBandwidth(b *testing.B) {
	words := make([]uint64, 256<<20/8)
	for i := range words {
		words[i] = rand.Uint64()
	}
	var sum uint64
	for b.Loop() {
		for i := 0; i+8 <= len(words); i += 8 { // a word of each cache line: Go has no wider load
			sum += words[i]
		}
	}
	if sum == 1 {
		b.Log(sum)
	}
	b.ReportMetric(float64(len(words))*float64(unsafe.Sizeof(sum))*float64(b.N)/b.Elapsed().Seconds()/1e9, "GB/s")
}
