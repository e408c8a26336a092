package tenant

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"
)

func pool(slots int) *Pool {
	p := &Pool{}
	p.Resize(slots)
	return p
}

func acquire(t *testing.T, p *Pool, tenant string, all bool) *Lease {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	l, err := p.Acquire(ctx, tenant, all)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// waits says that nobody gets a lease as things are.
func waits(t *testing.T, p *Pool, tenant string, all bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if l, err := p.Acquire(ctx, tenant, all); err == nil {
		t.Fatalf("%s got slot %d", tenant, l.Slot())
	}
}

// take makes the slots of a lease its tenant's, as Handler does after a flush.
func take(l *Lease) *Lease {
	for _, id := range l.foreign() {
		l.own(id, l.tenant)
	}
	return l
}

func TestATenantComesBackToItsOwnSlot(t *testing.T) {
	p := pool(3)
	ann, bob := take(acquire(t, p, "ann", false)), take(acquire(t, p, "bob", false))
	if ann.Slot() == bob.Slot() {
		t.Fatalf("both have slot %d", ann.Slot())
	}
	ann.Finish()
	bob.Finish()
	for name, was := range map[string]int{"ann": ann.Slot(), "bob": bob.Slot()} {
		l := acquire(t, p, name, false)
		if l.Slot() != was || len(l.foreign()) != 0 {
			t.Errorf("%s has slot %d with foreign %v, had %d", name, l.Slot(), l.foreign(), was)
		}
		l.Finish()
	}
}

// What another tenant left, and what nobody is known to have left, has to be flushed.
func TestForeignSlots(t *testing.T) {
	p := pool(1)
	l := acquire(t, p, "ann", false)
	if !slices.Equal(l.foreign(), []int{0}) {
		t.Errorf("a new engine's slot: foreign %v", l.foreign())
	}
	take(l).Finish()
	l = acquire(t, p, "bob", false)
	if !slices.Equal(l.foreign(), []int{0}) {
		t.Errorf("ann's slot: foreign %v for bob", l.foreign())
	}
	l.own(0, "") // a flush has begun, and failed
	l.Finish()
	for _, name := range []string{"ann", "bob"} {
		l = acquire(t, p, name, false)
		if !slices.Equal(l.foreign(), []int{0}) {
			t.Errorf("a slot of nobody's: foreign %v for %s", l.foreign(), name)
		}
		l.Finish()
	}
}

func TestASlotIsFreeWhenTheEngineHasHungUp(t *testing.T) {
	p := pool(1)
	l := acquire(t, p, "ann", false)
	if err := l.attach(); err != nil {
		t.Fatal(err)
	}
	l.Finish()
	waits(t, p, "bob", false)
	if err := l.attach(); !errors.Is(err, errFinished) {
		t.Errorf("another connection for a request that has ended: %v", err)
	}
	l.detach()
	acquire(t, p, "bob", false).Finish()
}

func TestAllSlots(t *testing.T) {
	p := pool(2)
	one := acquire(t, p, "ann", false)
	waits(t, p, "bob", true)
	one.Finish()
	all := acquire(t, p, "bob", true)
	if all.Slot() != -1 || !slices.Equal(all.foreign(), []int{0, 1}) {
		t.Errorf("slot %d, foreign %v", all.Slot(), all.foreign())
	}
	waits(t, p, "ann", false)
	all.Finish()
	acquire(t, p, "ann", false).Finish()
}

// One who waits for all slots is not overtaken for ever.
func TestThoseWhoWaitAreServedInTheirOrder(t *testing.T) {
	p := pool(2)
	busy := acquire(t, p, "ann", false)
	order := make(chan string, 2)
	for _, w := range []struct {
		name string
		all  bool
	}{{"bob", true}, {"cid", false}} {
		before := p.waiting()
		go func() {
			l, err := p.Acquire(t.Context(), w.name, w.all)
			if err == nil {
				order <- w.name
				l.Finish()
			}
		}()
		for p.waiting() == before {
			time.Sleep(time.Millisecond)
		}
	}
	busy.Finish()
	if first, second := <-order, <-order; first != "bob" || second != "cid" {
		t.Errorf("served %s, then %s", first, second)
	}
}

func (p *Pool) waiting() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waiters.Len()
}

func TestALeaseIsForOneEngine(t *testing.T) {
	p := pool(1)
	l := acquire(t, p, "ann", false)
	p.Resize(0)
	if err := l.current(); !errors.Is(err, errStale) {
		t.Errorf("while no engine runs: %v", err)
	}
	waits(t, p, "ann", false)
	p.Resize(1)
	if err := l.current(); !errors.Is(err, errStale) {
		t.Errorf("with the next engine: %v", err)
	}
	l.Finish() // gives back a slot that is no more
	next := acquire(t, p, "ann", false)
	if !slices.Equal(next.foreign(), []int{0}) {
		t.Errorf("foreign %v in a new engine", next.foreign())
	}
	waits(t, p, "bob", false)
	next.Finish()
}

func TestWaitingEnds(t *testing.T) {
	p := pool(1)
	p.Timeout = 10 * time.Millisecond
	l := acquire(t, p, "ann", false)
	if _, err := p.Acquire(t.Context(), "bob", false); !errors.Is(err, ErrLate) {
		t.Errorf("error %v, want ErrLate", err)
	}
	if n := p.waiting(); n != 0 {
		t.Errorf("%d still wait", n)
	}
	l.Finish()
}
