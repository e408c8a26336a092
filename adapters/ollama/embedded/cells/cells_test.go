package cells

import (
	"math"
	"slices"
	"testing"

	"github.com/ollama/ollama/kvcache"
	"github.com/ollama/ollama/ml"
	"github.com/ollama/ollama/model/input"
)

// graph takes what a cache puts into a graph.
type graph struct{ ml.Context }

func (g graph) Input() ml.Context                        { return g }
func (graph) FromInts([]int32, ...int) ml.Tensor         { return nil }
func (graph) FromFloats(s []float32, n ...int) ml.Tensor { return nil }

// forward has the engine take cells for tokens of a sequence.
func forward(t *testing.T, c *kvcache.Causal, sequence int, first, n int32) {
	t.Helper()
	var batch input.Batch
	for i := range n {
		batch.Positions = append(batch.Positions, first+i)
		batch.Sequences = append(batch.Sequences, sequence)
	}
	if err := c.StartForward(graph{}, batch, false); err != nil {
		t.Fatal(err)
	}
}

func bits(n int, set ...int) []uint32 {
	out := make([]uint32, (n+31)/32)
	for _, i := range set {
		out[i/32] |= 1 << (i % 32)
	}
	return out
}

func span(first, n int) (out []int) {
	for i := range n {
		out = append(out, first+i)
	}
	return out
}

// The engine's own cache, its conversations and what is wiped of them.
func TestCellsAreWipedWhenNobodyUsesThem(t *testing.T) {
	engine := kvcache.NewCausalCache(nil)
	engine.Init(nil, ml.DTypeF16, 2, 20, 16)
	var all Caches
	if err := all.follow(engine); err != nil || len(all.list) != 1 {
		t.Fatalf("%d caches, %v", len(all.list), err)
	}
	c := all.list[0]
	everything := span(0, 40)
	look := func(what string, wiped int, gone ...int) {
		t.Helper()
		stay, n := c.look()
		want := bits(40, slices.DeleteFunc(slices.Clone(everything), func(i int) bool { return slices.Contains(gone, i) })...)
		if n != wiped || n > 0 && !slices.Equal(stay, want) {
			t.Errorf("%s: %d wiped, %b stay; want %d, %b", what, n, stay, wiped, want)
		}
	}
	look("an empty cache", 0)
	forward(t, engine, 0, 0, 8)  // cells 0 to 7
	forward(t, engine, 1, 0, 4)  // 8 to 11
	look("two conversations", 0) // unused cells that were never used are no news
	engine.CopyPrefix(0, 1, 4)   // 8 to 11 are given up, 0 to 3 are shared
	look("given up for the first time", 0)
	look("and still", 4, 8, 9, 10, 11)
	look("wiped is wiped", 0)
	if err := engine.Remove(0, 2, math.MaxInt32); err != nil { // 2 and 3 are still the other's
		t.Fatal(err)
	}
	look("the end of a conversation", 0)
	forward(t, engine, 0, 2, 2) // takes 4 and 5 again
	look("its other cells", 2, 6, 7)
	if err := engine.Remove(1, 0, math.MaxInt32); err != nil {
		t.Fatal(err)
	}
	look("the other conversation goes", 0)
	look("with what it alone had", 2, 2, 3)
}

func TestCachesWithinACache(t *testing.T) {
	var all Caches
	wrapper := kvcache.NewWrapperCache(kvcache.NewSWACache(4, nil), kvcache.NewCausalCache(nil))
	if err := all.follow(wrapper); err != nil || len(all.list) != 2 {
		t.Fatalf("%d caches, %v; want 2", len(all.list), err)
	}
	if err := all.follow(kvcache.NewEncoderCache()); err != nil || len(all.list) != 0 {
		t.Fatalf("%d caches of another model, %v; want none", len(all.list), err)
	}
}
