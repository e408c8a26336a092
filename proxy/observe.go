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
// Asked, FirstByte and Chunk come where they happen. Asked comes when the request's body has been read, which may be any time, even after End, and from
// another goroutine than the rest.
const (
	Accepted  Kind = iota // the request was read so far as its header
	Queued                // it waits for its turn
	Slot                  // it has the slot Event.Slot of the engine; not for requests that take none
	Sent                  // a connection to the engine is open, and the request goes out
	FirstByte             // the first bytes of the answer's body
	Chunk                 // bytes of the answer's body as they came, the first included
	End                   // the answer is over, or was cut
	Clearing              // before Slot: the slot Event.Slot is cleared of another tenant's tokens
	Asked                 // what the request's body asks for, less its text
)

// Event of one request. What it points to is good only during the call.
type Event struct {
	Kind    Kind
	Request uint64 // counts the requests of this process
	At      time.Time
	HTTP    *http.Request // as the client sent it; its body must not be read
	Header  http.Header   // of the answer, with FirstByte and End
	Tenant  string        // name of the API key, with Slot; empty without keys
	Slot    int           // with Slot: the engine's number, tenant.AllSlots or tenant.AnySlot; with Clearing a number
	Data    []byte        // with Chunk: part of an answer, never to be logged or kept
	Status  int           // with End; 0 when nothing was answered
	Cut     bool          // with End: the answer broke off, or the client left
	Refusal string        // with End: the type of the error that the proxy itself answered with, else empty

	Parameters []Parameter // with Asked, in the order in which they came; the last one of a name counts
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
	cut      bool
}

// cut notes that the answer of the request whose context it is broke off, where it is made to look like one that ends.
func cut(ctx context.Context) {
	if o, ok := ctx.Value(observedKey{}).(*observed); ok {
		o.cut = true
	}
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
		this := &observed{observer: o, http: r, id: requests.Add(1)}
		ctx := context.WithValue(r.Context(), observedKey{}, this)
		out := &observedWriter{ResponseWriter: w, ctx: ctx}
		observe(ctx, Event{Kind: Accepted})
		whole := false
		defer func() {
			observe(ctx, Event{Kind: End, Status: out.status, Refusal: out.refusal, Header: w.Header(), Cut: this.cut || !whole})
		}()
		in := r.WithContext(ctx)
		ask(ctx, in)
		next.ServeHTTP(out, in)
		whole = true
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
