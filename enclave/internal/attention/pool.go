package attention

import (
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/kvshield/kvshield/enclave/internal/secmem"
)

// Pool is the threads that Attend runs on, with their scratch memory. It serves one call at a time; others wait. The caller's
// goroutine does its share, so a pool of one thread has no goroutine of its own.
type Pool struct {
	mu      sync.Mutex
	scratch []*secmem.Region // one for each thread, the caller's first
	jobs    []job            // what each thread works at
	parts   *secmem.Region
	vis     visibility
	slopes  []float32 // of the last call, for so many heads and this max_bias; never written again
	maxBias float32
	closed  bool

	current atomic.Pointer[run]
	wake    chan struct{}
	stop    chan struct{}
	done    sync.WaitGroup
}

// MaxThreads of a pool.
const MaxThreads = 256

// NewPool starts threads-1 helpers; fewer than 1 thread counts as 1, more than MaxThreads as MaxThreads. Close it.
func NewPool(threads int) *Pool {
	threads = min(max(threads, 1), MaxThreads)
	p := &Pool{
		scratch: make([]*secmem.Region, threads),
		jobs:    make([]job, threads),
		wake:    make(chan struct{}, threads),
		stop:    make(chan struct{}),
	}
	for i := 1; i < threads; i++ {
		p.done.Go(func() { p.help(i) })
	}
	return p
}

// Threads returns how many threads share the work.
func (p *Pool) Threads() int { return len(p.scratch) }

// Close ends the helpers and wipes the scratch memory. It waits for a running call, and may be called again.
func (p *Pool) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	close(p.stop)
	p.done.Wait()
	for _, r := range append(p.scratch, p.parts) {
		if r != nil {
			r.Wipe()
		}
	}
}

func (p *Pool) attend(r *run) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	r.c.mu.RLock()
	defer r.c.mu.RUnlock()
	if p.closed || r.c.closed {
		return ErrClosed
	}
	if err := p.prepare(r); err != nil {
		return err
	}
	p.do(r)
	if r.bad.Load() {
		return fmt.Errorf("%w: a query, or the result for one", ErrNotFinite)
	}
	return nil
}

// prepare plans the run and finds the memory for it.
func (p *Pool) prepare(r *run) error {
	r.vis = &p.vis
	if err := p.vis.see(&r.mask, r.tokens); err != nil {
		return err
	}
	if err := p.vis.check(r.c.written); err != nil {
		return err
	}
	if heads := r.c.shape.QueryHeads; len(p.slopes) != heads || p.maxBias != r.params.MaxBias {
		p.slopes, p.maxBias = Slopes(heads, r.params.MaxBias), r.params.MaxBias
	}
	r.slopes = p.slopes
	if err := r.plan(len(p.scratch)); err != nil {
		return err
	}
	j := r.job(0)
	for i := range p.scratch {
		if err := grow(&p.scratch[i], j.scratchFloats()+r.partFloats); err != nil {
			return err
		}
	}
	if r.splits > 1 {
		if err := grow(&p.parts, int(r.items)*r.partFloats); err != nil {
			return err
		}
		r.parts = floats(p.parts)
	}
	return nil
}

// The state of a run counts the helpers in it; `over` is added when no more may join.
const over = math.MinInt64

// spins is how long the caller looks for the helpers to finish before it sleeps: a few microseconds, about what one item's rest takes.
const spins = 2000

// do runs r on this goroutine and on whichever helper comes in time. A helper that wakes up late finds the run over and does
// not hold up the caller.
func (p *Pool) do(r *run) {
	if len(p.scratch) == 1 || r.items == 1 || r.small() {
		r.work(floats(p.scratch[0]), &p.jobs[0])
		return
	}
	r.ending = make(chan struct{}, 1)
	p.current.Store(r)
	for range min(int64(len(p.scratch)), r.items) - 1 {
		select {
		case p.wake <- struct{}{}:
		default: // enough wake-ups are under way
		}
	}
	r.work(floats(p.scratch[0]), &p.jobs[0])
	p.current.Store(nil)
	if r.state.Add(over) == over {
		return
	}
	for range spins {
		if r.state.Load() == over {
			return
		}
	}
	<-r.ending
}

// help is a helper: thread i of the pool.
func (p *Pool) help(i int) {
	for {
		select {
		case <-p.stop:
			return
		case <-p.wake:
		}
		r := p.current.Load()
		if r == nil || r.state.Add(1) < 0 {
			if r != nil {
				r.leave()
			}
			continue
		}
		r.work(floats(p.scratch[i]), &p.jobs[i])
		r.leave()
	}
}

// leave tells a caller that waits when the last helper goes. The channel has room for one notice and needs no more.
func (r *run) leave() {
	if r.state.Add(-1) == over {
		select {
		case r.ending <- struct{}{}:
		default:
		}
	}
}

// grow makes sure that a region holds n floats.
func grow(r **secmem.Region, n int) error {
	if *r != nil && len((*r).Bytes()) >= n*4 {
		return nil
	}
	if n > secmem.MaxSize/4 {
		return fmt.Errorf("%w: %d floats of scratch memory", ErrShape, n)
	}
	bigger, err := secmem.New(n * 4)
	if err != nil {
		return fmt.Errorf("no memory to compute attention in: %w", err)
	}
	if *r != nil {
		(*r).Wipe()
	}
	*r = bigger
	return nil
}

func floats(r *secmem.Region) []float32 {
	b := r.Bytes()
	return unsafe.Slice((*float32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}
