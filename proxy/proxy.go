// Package proxy is the streaming reverse proxy in front of a shielded engine.
//
// Start with [New]: it makes a handler that passes every request to the engine behind Config.Dial.
// Put it behind a listener with [Serve]. Whatever else a request has to pass first is a handler
// that wraps this one; nothing in here needs to know about it.
//
// Limits: HTTP/1.1 without protocol upgrades, because the proxy could not vouch for the end of an
// upgraded connection. There is no time limit on an answer or on a slow reader: a long prefill is
// silent for minutes. An engine whose answer carries neither a length nor chunks is refused, since
// its death would look like the end of the answer.
//
// Promises: an answer that the engine did not finish never looks finished (see [New]). A request
// is sent to the engine at most once. No error body and no log line holds any part of a request or
// of an answer.
package proxy

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// State is whether the engine takes requests.
type State struct {
	Ready bool
	// Reason is shown to the client when not ready, for instance "the enclave is restarting".
	Reason string
	// RetryAfter is when the client may try again; less than a second counts as one.
	RetryAfter time.Duration
}

// Config wires a proxy to its engine. Dial and State are required.
type Config struct {
	// Dial opens a connection to the engine's Unix socket. It is called once for each request.
	Dial func(ctx context.Context) (net.Conn, error)
	// State is asked before each request and after each failure; it must not block.
	State func() State
	// Log receives failures of the engine. Nil discards them.
	Log *slog.Logger
}

// New makes the handler. What the client gets when things go wrong:
//
//	the engine is not ready, or cannot be reached   503 with Retry-After, at once
//	the engine breaks off before its header         502
//	it breaks off in an event stream                an event with an error, and no [DONE]
//	it breaks off in newline-delimited JSON         a line with an error
//	it breaks off in any other body                 a broken connection (http.ErrAbortHandler)
func New(c Config) http.Handler {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	e := &engine{dial: c.Dial, state: c.State, log: c.Log}
	return gate(c.State, e.handler())
}

// gate answers for an engine that is not ready. It does not wait: the client knows better than
// the proxy how long its user will.
func gate(state func() State, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if st := state(); !st.Ready {
			writeUnavailable(w, st, orElse(st.Reason, "the engine is not ready"))
			return
		}
		next.ServeHTTP(w, r)
	})
}
