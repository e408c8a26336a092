// Package proxy is the streaming reverse proxy in front of a shielded engine.
//
// Start with [New]: it makes a handler that passes every request to the engine behind Config.Dial.
// Put it behind a listener with [Serve]. Packages below it decide what passes: keys who, policy what, limit how many
// at a time, tenant in which slot of the engine, strict which bytes are HTTP at all.
//
// Limits: HTTP/1.1 without protocol upgrades, because the proxy could not vouch for the end of an
// upgraded connection. Without Config.RequestTimeout there is no time limit on an answer or on a slow reader: a long prefill is
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

	"github.com/kvshield/kvshield/proxy/keys"
	"github.com/kvshield/kvshield/proxy/limit"
	"github.com/kvshield/kvshield/proxy/policy"
	"github.com/kvshield/kvshield/proxy/tenant"
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
	// Dial opens a connection to the engine. It is called once for each request, and again while it fails within DialPatience.
	Dial func(ctx context.Context) (net.Conn, error)
	// State is asked before each request and after each failure; it must not block.
	State func() State
	// Log receives failures of the engine. Nil discards them.
	Log *slog.Logger

	DialPatience   time.Duration           // how long a connection is tried again; 0: once
	RequestTimeout time.Duration           // for a request from its turn to its end; 0: none
	MaxBody        int64                   // bytes of a request's body; 0: no limit
	Keys           *keys.Ring              // who is let in; nil: everybody
	Policy         policy.Policy           // what is refused
	Limit          *limit.Limiter          // of requests that have a body; nil: none
	Tenants        *tenant.Pool            // keeps the slots of tenants apart; nil: they share
	Slots          *tenant.Pool            // without Tenants: names slots, so that it is known which request is in which; nil: the engine chooses
	Status         func() any              // what GET /kvshield/status shows, as JSON; nil: no such page
	Observer       Observer                // is told what happens; may be nil
	Ollama         bool                    // the engine is Ollama: errors of its own API are written as it does, files that models are made of may be of any size
	Own            map[string]http.Handler // further paths that are answered here, by their exact path, for those who are let in
}

// New makes the handler. What the client gets when things go wrong:
//
//	the engine is not ready, or cannot be reached   503 with Retry-After
//	the engine breaks off before its header         502
//	it breaks off in an event stream                an event with an error, and no [DONE]
//	it breaks off in newline-delimited JSON         a line with an error
//	it breaks off in any other body                 a broken connection (http.ErrAbortHandler)
//	the request runs past RequestTimeout            504, or as if the engine had broken off
func New(c Config) http.Handler {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	e := &engine{dial: c.Dial, state: c.State, log: c.Log, patience: c.DialPatience}
	way := e.transport()
	if c.Tenants != nil || c.Slots != nil {
		way = tenant.Transport(way)
		e.dial = tenant.Dialer(c.Dial)
	}
	var h http.Handler = e.handler(way)
	switch {
	case c.Tenants != nil:
		h = tenant.Handler(tenant.Config{Pool: c.Tenants, Of: tenantOf, MaxBody: c.MaxBody, Granted: granted, Clearing: clearing, Flush: way}, h)
	case c.Slots != nil:
		h = tenant.Share(tenant.Config{Pool: c.Slots, MaxBody: c.MaxBody, Granted: granted}, h)
	}
	h = c.timed(h)
	h = c.limited(h)
	h = gate(c.State, h)
	h = c.checked(h)
	h = c.own(h)
	h = c.admitted(h)
	h = c.sized(h)
	if c.Ollama {
		h = plain(h)
	}
	return observing(c.Observer, sound(h))
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
