package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

const (
	readHeaderTimeout     = 10 * time.Second
	idleTimeout           = 2 * time.Minute
	maxRequestHeaderBytes = 64 << 10
)

// ErrDrain is returned by Serve when answers were still running at the end of the drain time.
var ErrDrain = errors.New("answers were cut: they were still running when the time to drain was over")

// Serve answers on l until ctx ends. Then it closes l, lets running answers finish for as long as
// drain, and closes the connections of the rest. It returns nil when no answer was cut.
func Serve(ctx context.Context, l net.Listener, h http.Handler, drain time.Duration) error {
	// Requests outlive ctx by the drain time, and not longer.
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var running atomic.Int64
	srv := &http.Server{
		Handler:           count(&running, h),
		BaseContext:       func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxRequestHeaderBytes,
	}
	defer srv.Close()
	stopped := make(chan error, 1)
	go func() { stopped <- srv.Serve(l) }()
	select {
	case err := <-stopped:
		return fmt.Errorf("the listener on %s failed: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	dctx, stop := context.WithTimeout(base, drain)
	defer stop()
	err := srv.Shutdown(dctx)
	<-stopped
	// A connection that never sent a request also holds up Shutdown; closing it cuts no answer.
	if errors.Is(err, context.DeadlineExceeded) {
		err = nil
		if running.Load() > 0 {
			err = ErrDrain
		}
	}
	return err
}

func count(running *atomic.Int64, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		running.Add(1)
		defer running.Add(-1)
		h.ServeHTTP(w, r)
	})
}
