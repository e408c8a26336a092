package tenant

import (
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

type leaseKey struct{}

func withLease(ctx context.Context, l *Lease) context.Context {
	return context.WithValue(ctx, leaseKey{}, l)
}

// Dialer makes connections that hold the lease of their request until the engine has hung up.
func Dialer(dial func(context.Context) (net.Conn, error)) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		l, ok := ctx.Value(leaseKey{}).(*Lease)
		if !ok {
			return dial(ctx)
		}
		if err := l.attach(); err != nil {
			return nil, err
		}
		c, err := dial(ctx)
		if err == nil {
			// Asked after dialling: what was reached before this is the lease's own engine.
			if err = l.current(); err != nil {
				c.Close()
			}
		}
		if err != nil {
			l.detach()
			return nil, err
		}
		return &conn{Conn: c, lease: l}, nil
	}
}

// hangUp is how long the end of an answer is held back for the engine to hang up.
const hangUp = 50 * time.Millisecond

// Transport holds back the end of an answer until the engine has hung up, which it does at once. Else a client that goes on at once
// would find its own slot in use and be given another one, where nothing of its conversation is.
func Transport(next http.RoundTripper) http.RoundTripper { return transport{next} }

type transport struct{ http.RoundTripper }

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.RoundTripper.RoundTrip(r)
	if l, ok := r.Context().Value(leaseKey{}).(*Lease); ok && err == nil {
		resp.Body = ending{resp.Body, l}
	}
	return resp, err
}

type ending struct {
	io.ReadCloser
	lease *Lease
}

func (e ending) Read(p []byte) (int, error) {
	n, err := e.ReadCloser.Read(p)
	if err == io.EOF {
		e.lease.await(hangUp)
	}
	return n, err
}

// conn is a connection for a lease. Closing it tells the engine that nobody listens any more, and waits in the background until
// the engine has hung up, which it does when it has cancelled the request.
type conn struct {
	net.Conn
	lease   *Lease
	once    sync.Once
	closed  atomic.Bool
	written atomic.Bool
}

func (c *conn) Write(p []byte) (int, error) {
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	c.written.Store(true)
	return c.Conn.Write(p)
}

func (c *conn) Read(p []byte) (int, error) {
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	return c.Conn.Read(p)
}

func (c *conn) Close() error {
	c.once.Do(func() {
		c.closed.Store(true)
		half, ok := c.Conn.(interface{ CloseWrite() error })
		if !c.written.Load() || !ok || half.CloseWrite() != nil {
			c.Conn.Close()
			c.lease.detach()
			return
		}
		go func() {
			io.Copy(io.Discard, c.Conn)
			c.Conn.Close()
			c.lease.detach()
		}()
	})
	return nil
}
