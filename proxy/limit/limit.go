// Package limit lets so many requests through at a time and has the next ones wait, in the order in which they came.
package limit

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// Why a request was not let through.
var (
	ErrFull = errors.New("too many requests are waiting")
	ErrLate = errors.New("the request waited too long for its turn")
)

// Limiter of requests. The zero value lets everything through.
type Limiter struct {
	turns   *semaphore.Weighted
	queue   int64
	timeout time.Duration
	waiting atomic.Int64
}

// New lets concurrent requests through, and so many wait (0: none) for no longer than timeout (0: for ever).
func New(concurrent, queue int, timeout time.Duration) *Limiter {
	l := &Limiter{queue: int64(queue), timeout: timeout}
	if concurrent > 0 {
		l.turns = semaphore.NewWeighted(int64(concurrent))
	}
	return l
}

// Enter waits for a turn, and returns what ends it. Queued, when not nil, is called before a wait.
func (l *Limiter) Enter(ctx context.Context, queued func()) (leave func(), err error) {
	if l.turns == nil {
		return func() {}, nil
	}
	leave = func() { l.turns.Release(1) }
	if l.turns.TryAcquire(1) {
		return leave, nil
	}
	if l.waiting.Add(1) > l.queue {
		l.waiting.Add(-1)
		return nil, ErrFull
	}
	defer l.waiting.Add(-1)
	if queued != nil {
		queued()
	}
	if l.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, l.timeout, ErrLate)
		defer cancel()
	}
	if err := l.turns.Acquire(ctx, 1); err != nil {
		return nil, context.Cause(ctx)
	}
	return leave, nil
}
