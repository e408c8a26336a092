package proxy

import (
	"context"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v4"

	"github.com/kvshield/kvshield/proxy/reply"
)

const (
	dialTimeout    = 5 * time.Second
	dialPause      = 20 * time.Millisecond
	maxHeaderBytes = 1 << 20 // of the engine's answer
)

// errUnframed is an answer that ends where its connection ends.
var errUnframed = errors.New("the answer has neither a length nor chunks")

// dialError and uploadError say which side a failed exchange failed on.
type (
	dialError   struct{ error }
	uploadError struct{ error }
)

func (e dialError) Unwrap() error   { return e.error }
func (e uploadError) Unwrap() error { return e.error }

// engine is one engine behind its socket.
type engine struct {
	dial  func(context.Context) (net.Conn, error)
	state func() State
	log   *slog.Logger
	// patience is how long dialling is tried again; 0: once.
	patience time.Duration
}

func (e *engine) handler(way http.RoundTripper) http.Handler {
	return &httputil.ReverseProxy{
		Rewrite:        rewrite,
		Transport:      way,
		FlushInterval:  -1,
		ModifyResponse: e.watch,
		ErrorHandler:   e.fail,
		// Its lines would quote the engine; watch and fail write what there is to say.
		ErrorLog: log.New(io.Discard, "", 0),
	}
}

// transport opens one connection for each request. A Unix socket costs microseconds to open, and an
// idle connection costs more than that: it occupies one of llama-server's few HTTP threads, it
// fails the first request after a restart, and net/http logs in full whatever arrives on it.
func (e *engine) transport() http.RoundTripper {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			c, err := e.connect(ctx)
			if err != nil {
				return nil, dialError{err}
			}
			observe(ctx, Event{Kind: Sent})
			return c, nil
		},
		DisableKeepAlives:      true,
		DisableCompression:     true,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: maxHeaderBytes,
	}
}

// connect tries again for a moment: nothing was sent yet, so that is safe. An engine that is known to be away is not
// waited for.
func (e *engine) connect(ctx context.Context) (net.Conn, error) {
	pauses := backoff.NewExponentialBackOff(backoff.WithInitialInterval(dialPause), backoff.WithMaxElapsedTime(e.patience))
	if e.patience <= 0 {
		return e.dial(ctx)
	}
	return backoff.RetryWithData(func() (net.Conn, error) {
		c, err := e.dial(ctx)
		if err != nil && !e.state().Ready {
			err = backoff.Permanent(err)
		}
		return c, err
	}, backoff.WithContext(pauses, ctx))
}

// rewrite addresses the request to the engine, which is told nothing about who the client is:
// forwarding headers are left out.
func rewrite(p *httputil.ProxyRequest) {
	p.SetURL(&url.URL{Scheme: "http", Host: "localhost"})
	p.Out.Header.Del("Connection")
	p.Out.Header.Del("Upgrade")
	for _, h := range methodOverrides {
		p.Out.Header.Del(h)
	}
	if p.Out.Body != nil {
		p.Out.Body = &upload{ReadCloser: p.Out.Body}
	}
}

// methodOverrides would make a request another one behind the policy's back, in an engine that heeds them.
var methodOverrides = []string{"X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "X-Original-URL", "X-Rewrite-URL"}

// fail answers for a request that got no answer from the engine.
func (e *engine) fail(w http.ResponseWriter, r *http.Request, err error) {
	st := e.state()
	var dial dialError
	var up uploadError
	switch {
	case context.Cause(r.Context()) == errTooLong:
		tooLong.Write(w)
	case r.Context().Err() != nil:
		panic(http.ErrAbortHandler) // the client has left, or the server is closing
	case errors.As(err, &dial):
		e.log.WarnContext(r.Context(), "the engine cannot be reached", "cause", dial.error)
		writeUnavailable(w, st, orElse(st.Reason, "the engine cannot be reached"))
	case errors.As(err, new(*http.MaxBytesError)):
		tooLarge.Write(w)
	case errors.As(err, &up):
		reply.Failure{Message: "the request body broke off; send the request again", Type: reply.BadRequest, Code: http.StatusBadRequest}.Write(w)
	case errors.Is(err, errUnframed):
		e.log.WarnContext(r.Context(), "the engine's answer was refused", "cause", cause(err))
		reply.Failure{
			Message: "the engine's answer was refused: it has neither a length nor chunks, so its end could not be told from a crash; use an engine that speaks HTTP/1.1",
			Type:    reply.Server,
			Code:    http.StatusBadGateway,
		}.Write(w)
	default:
		e.log.WarnContext(r.Context(), "the engine stopped before it answered", "cause", cause(err))
		broken(st, "before it answered").Write(w)
	}
}

// upload tells a client that stops sending from an engine that stops reading.
type upload struct {
	io.ReadCloser
	closed atomic.Bool
}

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.ReadCloser.Read(p)
	if err != nil && err != io.EOF && !u.closed.Load() {
		err = uploadError{err}
	}
	return n, err
}

// Close is called by the transport when the engine is gone; reads that fail after it are not the
// client's doing.
func (u *upload) Close() error {
	u.closed.Store(true)
	return u.ReadCloser.Close()
}
