package tenant

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
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
