package proxy

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"
)

// Kind of an event.
type Kind int

// Events of a request, in the order in which they can come. Every request has an Accepted and an End; Queued, Slot, Sent,
// FirstByte and Chunk come where they happen.
const (
	Accepted  Kind = iota // the request was read so far as its header
	Queued                // it waits for its turn
	Slot                  // it has the slot Event.Slot of the engine
	Sent                  // a connection to the engine is open, and the request goes out
	FirstByte             // the first bytes of the answer's body
	Chunk                 // bytes of the answer's body as they came, the first included
	End                   // the answer is over, or was cut
)

// Event of one request. What it points to is good only during the call.
type Event struct {
	Kind    Kind
	Request uint64 // counts the requests of this process
	At      time.Time
	HTTP    *http.Request // as the client sent it; its body must not be read
	Header  http.Header   // of the answer, with FirstByte and End
	Tenant  string        // name of the API key, with Slot; empty without keys
	Slot    int           // with Slot
	Data    []byte        // with Chunk: part of an answer, never to be logged or kept
	Status  int           // with End; 0 when nothing was answered
	Refusal string        // with End: the type of the error that the proxy itself answered with, else empty
}

// Observer is told what happens to requests. It is called by many goroutines and must not block. The context is the
// request's: whatever a handler around the proxy's put into it is there.
type Observer interface {
	Observe(context.Context, Event)
}

// Observers are all told, in their order; nil ones are passed over.
type Observers []Observer

// Observe implements Observer.
func (l Observers) Observe(ctx context.Context, e Event) {
	for _, o := range l {
		if o != nil {
			o.Observe(ctx, e)
		}
	}
}

type observedKey struct{}

// observed is one request under observation.
type observed struct {
	observer Observer
	http     *http.Request
	id       uint64
}

var requests atomic.Uint64

// observe tells of an event of the request whose context it is, where anybody listens.
func observe(ctx context.Context, e Event) {
	o, ok := ctx.Value(observedKey{}).(*observed)
	if !ok {
		return
	}
	e.Request, e.HTTP, e.At = o.id, o.http, time.Now()
	o.observer.Observe(ctx, e)
}

// observing tells the observer of every request that passes.
func observing(o Observer, next http.Handler) http.Handler {
	if o == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := context.WithValue(r.Context(), observedKey{}, &observed{o, r, requests.Add(1)})
		out := &observedWriter{ResponseWriter: w, ctx: ctx}
		observe(ctx, Event{Kind: Accepted})
		defer func() {
			observe(ctx, Event{Kind: End, Status: out.status, Refusal: out.refusal, Header: w.Header()})
		}()
		next.ServeHTTP(out, r.WithContext(ctx))
	})
}

type observedWriter struct {
	http.ResponseWriter
	ctx     context.Context
	status  int
	refusal string
	begun   bool
}

func (w *observedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Refused is called by reply.Failure.
func (w *observedWriter) Refused(kind string) { w.refusal = kind }

func (w *observedWriter) WriteHeader(status int) {
	if status >= 200 && w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *observedWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	if !w.begun {
		w.begun = true
		observe(w.ctx, Event{Kind: FirstByte, Header: w.Header()})
	}
	observe(w.ctx, Event{Kind: Chunk, Data: p})
	return w.ResponseWriter.Write(p)
}
