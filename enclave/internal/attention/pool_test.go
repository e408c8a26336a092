package attention

import (
	"errors"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Several layers, each with its own caller, share a pool; cells are written meanwhile. The race detector watches.
func TestCallersShareAPool(t *testing.T) {
	pool := NewPool(3)
	defer pool.Close()
	var callers sync.WaitGroup
	for seed := range uint64(4) {
		l := newLayer(Shape{8, 2, 64, 64, F16}, 2, 600, seed)
		l.causal(0)
		params := l.params
		params.Pool = pool
		c := l.cache(t, best())
		want := l.rounded(t, c).attend()
		m := l.bytes(MaskF16, 600)
		callers.Go(func() {
			for i := range 200 {
				out := make([]float32, len(want))
				if err := Attend(out, l.q, c, m, params); err != nil {
					t.Error(err)
					return
				}
				worst(t, out, want, tolerance(l.shape))
				if err := c.Put(int64(i), l.k[i], l.v[i]); err != nil { // as it was
					t.Error(err)
				}
			}
		})
	}
	callers.Wait()
}

// The scratch memory grows with what is asked of it, and short calls after long ones are right too.
func TestAPoolServesEveryShape(t *testing.T) {
	pool := NewPool(2)
	defer pool.Close()
	for _, tt := range []struct {
		shape         Shape
		tokens, cells int
	}{
		{Shape{2, 1, 40, 40, F16}, 1, 40}, {Shape{8, 2, 256, 256, Q8_0}, 30, 300}, {Shape{2, 1, 40, 40, F16}, 1, 600},
		{Shape{64, 1, 128, 64, F16}, 1, 2000}, {Shape{4, 4, 64, 64, F32}, 100, 100},
	} {
		l := newLayer(tt.shape, tt.tokens, tt.cells, 3)
		l.causal(0)
		l.params.Pool = pool
		c := l.cache(t, best())
		out := make([]float32, tt.tokens*tt.shape.QueryHeads*tt.shape.DimV)
		if err := Attend(out, l.q, c, l.bytes(MaskF16, tt.cells), l.params); err != nil {
			t.Fatal(err)
		}
		worst(t, out, l.rounded(t, c).attend(), tolerance(tt.shape))
	}
}

func TestClosedPool(t *testing.T) {
	for _, threads := range []int{-1, 0, 1, 4, MaxThreads + 1} {
		pool := NewPool(threads)
		if want := min(max(threads, 1), MaxThreads); pool.Threads() != want {
			t.Errorf("a pool of %d threads has %d, want %d", threads, pool.Threads(), want)
		}
		l := newLayer(small, 1, 40, 1)
		l.params.Pool = pool
		c := l.cache(t, best())
		out := make([]float32, 4*24)
		if err := Attend(out, l.q, c, l.bytes(NoMask, 0), l.params); err != nil {
			t.Fatal(err)
		}
		pool.Close()
		pool.Close()
		if err := Attend(out, l.q, c, l.bytes(NoMask, 0), l.params); !errors.Is(err, ErrClosed) {
			t.Errorf("error %v, want ErrClosed", err)
		}
	}
}

// Closing waits for the call that is running; whoever comes later is told.
func TestCloseWhileAttending(t *testing.T) {
	pool := NewPool(2)
	l := newLayer(Shape{8, 2, 64, 64, F16}, 1, 600, 1)
	l.params.Pool = pool
	c := l.cache(t, best())
	var callers sync.WaitGroup
	started := make(chan struct{})
	callers.Go(func() {
		out := make([]float32, 8*64)
		for first := true; ; first = false {
			err := Attend(out, l.q, c, l.bytes(NoMask, 0), l.params)
			if errors.Is(err, ErrClosed) {
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			if first {
				close(started)
			}
		}
	})
	<-started
	pool.Close()
	c.Close()
	callers.Wait()
}
