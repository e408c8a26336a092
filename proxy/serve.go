package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/kvshield/kvshield/proxy/strict"
)

// ErrDrain is returned by Serve when answers were still running at the end of the drain time.
var ErrDrain = errors.New("answers were cut: they were still running when the time to drain was over")

// ServeConfig are the limits of a listener. The zero value of each but Drain and TLS stands for its default.
type ServeConfig struct {
	Drain             time.Duration // how long running answers may go on at the end
	MaxHeader         int           // bytes of a request's header; default 64 KiB
	ReadHeaderTimeout time.Duration // from a request's first byte to the end of its header; default 10 s
	IdleTimeout       time.Duration // between requests; default 2 min
	TLS               *tls.Config   // nil: plain HTTP
}

func (c ServeConfig) withDefaults() ServeConfig {
	if c.MaxHeader <= 0 {
		c.MaxHeader = 64 << 10
	}
	if c.ReadHeaderTimeout <= 0 {
		c.ReadHeaderTimeout = 10 * time.Second
	}
	if c.IdleTimeout <= 0 {
		c.IdleTimeout = 2 * time.Minute
	}
	return c
}

// ownHeader is room beyond MaxHeader, so that it is the strict listener that refuses, with a message.
const ownHeader = 8 << 10

// Serve answers on l until ctx ends. Then it closes l, lets running answers finish for as long as
// the drain time, and closes the connections of the rest. It returns nil when no answer was cut.
func Serve(ctx context.Context, l net.Listener, h http.Handler, c ServeConfig) error {
	c = c.withDefaults()
	// Requests outlive ctx by the drain time, and not longer.
	base, cancel := context.WithCancel(context.WithValue(context.WithoutCancel(ctx), drainKey{}, ctx))
	defer cancel()
	var running atomic.Int64
	srv := &http.Server{
		Handler:           count(&running, strict.Handler(h)),
		BaseContext:       func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: c.ReadHeaderTimeout,
		IdleTimeout:       c.IdleTimeout,
		MaxHeaderBytes:    c.MaxHeader + ownHeader,
	}
	defer srv.Close()
	stopped := make(chan error, 1)
	address := l.Addr()
	if c.TLS != nil {
		l = tls.NewListener(l, c.TLS)
	}
	go func() { stopped <- srv.Serve(strict.Listener(l, c.MaxHeader)) }()
	select {
	case err := <-stopped:
		return fmt.Errorf("the listener on %s failed: %w", address, err)
	case <-ctx.Done():
	}
	dctx, stop := context.WithTimeout(base, c.Drain)
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
