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
)

const (
	dialTimeout    = 5 * time.Second
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
}

func (e *engine) handler() http.Handler {
	return &httputil.ReverseProxy{
		Rewrite:        rewrite,
		Transport:      e.transport(),
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
			c, err := e.dial(ctx)
			if err != nil {
				return nil, dialError{err}
			}
			return c, nil
		},
		DisableKeepAlives:      true,
		DisableCompression:     true,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: maxHeaderBytes,
	}
}

// rewrite addresses the request to the engine, which is told nothing about who the client is:
// forwarding headers are left out.
func rewrite(p *httputil.ProxyRequest) {
	p.SetURL(&url.URL{Scheme: "http", Host: "localhost"})
	p.Out.Header.Del("Connection")
	p.Out.Header.Del("Upgrade")
	if p.Out.Body != nil {
		p.Out.Body = &upload{ReadCloser: p.Out.Body}
	}
}

// fail answers for a request that got no answer from the engine.
func (e *engine) fail(w http.ResponseWriter, r *http.Request, err error) {
	st := e.state()
	var dial dialError
	var up uploadError
	switch {
	case r.Context().Err() != nil:
		panic(http.ErrAbortHandler) // the client has left, or the server is closing
	case errors.As(err, &dial):
		e.log.Warn("the engine cannot be reached", "cause", dial.error)
		writeUnavailable(w, st, orElse(st.Reason, "the engine cannot be reached"))
	case errors.As(err, &up):
		failure{"the request body broke off; send the request again", badRequest, http.StatusBadRequest}.write(w)
	case errors.Is(err, errUnframed):
		e.log.Warn("the engine's answer was refused", "cause", cause(err))
		failure{
			Message: "the engine's answer was refused: it has neither a length nor chunks, so its end could not be told from a crash; use an engine that speaks HTTP/1.1",
			Type:    serverError,
			Code:    http.StatusBadGateway,
		}.write(w)
	default:
		e.log.Warn("the engine stopped before it answered", "cause", cause(err))
		broken(st, "before it answered").write(w)
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
