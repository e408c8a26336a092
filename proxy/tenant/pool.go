package tenant

import (
	"container/list"
	"context"
	"errors"
	"sync"
	"time"
)

// ErrLate is a request that waited for a slot longer than the pool lets one.
var ErrLate = errors.New("the request waited too long for a slot")

// Pool knows which tenant's tokens are in which slot of the engine, and which slots are in use.
type Pool struct {
	// Timeout is how long a request waits for a slot; 0: for ever. KeepsNothing is true for an engine without a cache, whose slots
	// cannot carry anything over. Both are set before the first request.
	Timeout      time.Duration
	KeepsNothing bool

	mu      sync.Mutex
	slots   []*slot
	unknown bool // how many there are
	engine  int  // counts the engines that there have been
	clock   int64
	waiters list.List // of *waiter, in the order in which they came
}

// slot of the engine. Its owner is the tenant whose tokens alone can be in it; empty when that is not known.
type slot struct {
	id    int
	owner string
	busy  bool
	used  int64
	had   print // the request that was in it last
}

type waiter struct {
	tenant string
	all    bool
	wish   *wish // where tenants share: what is asked for instead of a tenant's slot
	ready  chan *Lease
}

// Resize tells of an engine that has just started, with so many slots; before one is started it is called with none. Leases for the
// engine before cannot reach it. A negative number is an engine that does not say.
func (p *Pool) Resize(slots int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.engine++
	p.unknown = slots < 0
	p.slots = make([]*slot, max(slots, 0))
	for i := range p.slots {
		p.slots[i] = &slot{id: i}
	}
	p.grant()
}

// Acquire waits for a slot for the tenant, or for all slots.
func (p *Pool) Acquire(ctx context.Context, tenant string, all bool) (*Lease, error) {
	return p.wait(ctx, &waiter{tenant: tenant, all: all, ready: make(chan *Lease, 1)})
}

func (p *Pool) wait(ctx context.Context, w *waiter) (*Lease, error) {
	if p.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, p.Timeout, ErrLate)
		defer cancel()
	}
	p.mu.Lock()
	at := p.waiters.PushBack(w)
	p.grant()
	p.mu.Unlock()
	select {
	case l := <-w.ready:
		return l, nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	p.waiters.Remove(at)
	p.grant()
	p.mu.Unlock()
	select {
	case l := <-w.ready: // granted at the last moment
		l.Finish()
	default:
	}
	return nil, context.Cause(ctx)
}

// grant serves those who wait in their order; one who waits for all slots holds up those behind, one who waits for a slot by its
// number does not. The caller holds mu.
func (p *Pool) grant() {
	var next *list.Element
	for at := p.waiters.Front(); at != nil; at = next {
		next = at.Next()
		w := at.Value.(*waiter)
		chosen := p.choose(w)
		if len(chosen) == 0 {
			if w.wish == nil || w.wish.slot < 0 {
				return
			}
			continue
		}
		p.clock++
		for _, s := range chosen {
			s.busy, s.used = true, p.clock
		}
		p.waiters.Remove(at)
		w.ready <- &Lease{pool: p, engine: p.engine, tenant: w.tenant, slots: chosen, all: w.all, quiet: make(chan struct{}, 1)}
	}
}

func (p *Pool) choose(w *waiter) []*slot {
	if w.wish != nil {
		return p.place(w.wish)
	}
	var best *slot
	for _, s := range p.slots {
		if s.busy && w.all {
			return nil
		}
		if !s.busy && (best == nil || better(s, best, w.tenant)) {
			best = s
		}
	}
	if w.all && best != nil {
		return p.slots
	}
	if best == nil {
		return nil
	}
	return []*slot{best}
}

// better prefers the tenant's own slots, the latest first, then the one that was used least lately.
func better(a, b *slot, tenant string) bool {
	own := a.owner == tenant
	if own != (b.owner == tenant) {
		return own
	}
	if own {
		return a.used > b.used
	}
	return a.used < b.used
}

// Lease is the use of a slot, or of all, by one request. It ends when the request has ended and the engine has hung up on
// every connection that was made for it: only then has the engine let go of the slot.
type Lease struct {
	pool   *Pool
	engine int
	tenant string
	slots  []*slot
	all    bool

	mu       sync.Mutex
	open     int // connections
	finished bool
	over     bool
	quiet    chan struct{} // gets something when the last connection is gone
}

// Slot of the engine, -1 when it has all.
func (l *Lease) Slot() int {
	if l.all {
		return -1
	}
	return l.slots[0].id
}

// foreign slots may hold somebody else's tokens.
func (l *Lease) foreign() []int {
	l.pool.mu.Lock()
	defer l.pool.mu.Unlock()
	var ids []int
	for _, s := range l.slots {
		if s.owner != l.tenant {
			ids = append(ids, s.id)
		}
	}
	return ids
}

// own notes who owns a slot of the lease.
func (l *Lease) own(id int, tenant string) {
	l.pool.mu.Lock()
	defer l.pool.mu.Unlock()
	for _, s := range l.slots {
		if s.id == id {
			s.owner = tenant
		}
	}
}

var (
	errFinished = errors.New("the request has ended")
	errStale    = errors.New("the engine was started again")
)

// current says whether the engine is still the one that the lease is for.
func (l *Lease) current() error {
	l.pool.mu.Lock()
	defer l.pool.mu.Unlock()
	if l.engine != l.pool.engine {
		return errStale
	}
	return nil
}

// attach notes a connection for the lease.
func (l *Lease) attach() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.finished {
		return errFinished
	}
	l.open++
	return nil
}

func (l *Lease) detach() {
	l.mu.Lock()
	if l.open--; l.open == 0 {
		select {
		case l.quiet <- struct{}{}:
		default:
		}
	}
	l.settle()
}

// await gives the engine a moment to hang up.
func (l *Lease) await(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		l.mu.Lock()
		open := l.open
		l.mu.Unlock()
		if open == 0 {
			return
		}
		select {
		case <-l.quiet:
		case <-timer.C:
			return
		}
	}
}

// Finish ends the request.
func (l *Lease) Finish() { l.mu.Lock(); l.finished = true; l.settle() }

// settle gives the slots back when nothing is left of the request. It unlocks mu.
func (l *Lease) settle() {
	over := l.finished && l.open == 0 && !l.over
	l.over = l.over || over
	l.mu.Unlock()
	if !over {
		return
	}
	l.pool.mu.Lock()
	defer l.pool.mu.Unlock()
	for _, s := range l.slots {
		s.busy = false
	}
	l.pool.grant()
}
