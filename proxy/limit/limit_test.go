package limit

import (
	"context"
	"errors"
	"testing"
	"time"
)

func TestTurns(t *testing.T) {
	l := New(1, 1, time.Minute)
	leave, err := l.Enter(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	queued, entered := make(chan struct{}), make(chan error, 1)
	go func() {
		leave, err := l.Enter(t.Context(), func() { close(queued) })
		if err == nil {
			leave()
		}
		entered <- err
	}()
	<-queued
	if _, err := l.Enter(t.Context(), nil); !errors.Is(err, ErrFull) {
		t.Errorf("with a full queue: %v", err)
	}
	leave()
	if err := <-entered; err != nil {
		t.Error(err)
	}
	if leave, err := l.Enter(t.Context(), nil); err != nil {
		t.Error("nobody is there, but it is full")
	} else {
		leave()
	}
}

func TestLateAndGone(t *testing.T) {
	l := New(1, 5, time.Millisecond)
	leave, _ := l.Enter(t.Context(), nil)
	defer leave()
	if _, err := l.Enter(t.Context(), nil); !errors.Is(err, ErrLate) {
		t.Errorf("got %v, want ErrLate", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := New(1, 5, 0).Enter(ctx, nil); err != nil {
		t.Errorf("a free turn was refused: %v", err)
	}
	if _, err := l.Enter(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that the client has left", err)
	}
}

func TestNoLimit(t *testing.T) {
	l := New(0, 0, 0)
	for range 100 {
		if _, err := l.Enter(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
}
