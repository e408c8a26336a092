package telemetry

import (
	"context"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	genai "go.opentelemetry.io/otel/semconv/v1.41.0"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/kvshield/kvshield/proxy"
	"github.com/kvshield/kvshield/proxy/tenant"
	"github.com/kvshield/kvshield/telemetry/answer"
	"github.com/kvshield/kvshield/telemetry/attribution"
)

// maxTokens of a request have an event of their own in its span.
const maxTokens = 128

// request is one request to the model.
type request struct {
	t         *Telemetry
	operation string
	route     string
	ctx       context.Context // with the span
	span      trace.Span
	layers    bool // it has spans for layers

	// Of the goroutine that serves it.
	scanner                          *answer.Scanner
	accepted, sent, slot, first, end time.Time
	status                           int
	failure                          string // error.type; empty when all went well

	// Under the telemetry's lock.
	closed  bool
	model   string
	record  metric.MeasurementOption
	account attribution.Account
	tokens  []attribution.Token
}

type requestKey struct{}

func requestOf(ctx context.Context) *request { r, _ := ctx.Value(requestKey{}).(*request); return r }

// Handler has a span around each request to the model. The engine, and who reads the answer's header, are told of it by W3C's trace
// context.
func (t *Telemetry) Handler(next http.Handler) http.Handler {
	if t == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, in *http.Request) {
		operation := operationOf(in)
		if operation == "" {
			next.ServeHTTP(w, in)
			return
		}
		r := t.begin(propagator.Extract(in.Context(), propagation.HeaderCarrier(in.Header)), operation, in.URL.Path)
		in = in.WithContext(r.ctx)
		in.Header = in.Header.Clone()
		propagator.Inject(r.ctx, propagation.HeaderCarrier(in.Header))
		if r.span.IsRecording() {
			said := propagation.HeaderCarrier{}
			propagator.Inject(r.ctx, said)
			w.Header().Set("Traceresponse", said.Get("traceparent"))
		}
		next.ServeHTTP(w, in)
	})
}

func (t *Telemetry) begin(ctx context.Context, operation, route string) *request {
	r := &request{t: t, operation: operation, route: route, model: t.c.Model}
	o := []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(r.attributes()...),
		trace.WithAttributes(semconv.HTTPRequestMethodPost, semconv.HTTPRoute(route), keyMode.String(t.c.Mode))}
	if shield := t.shield.Load(); shield != nil {
		o = append(o, trace.WithLinks(trace.Link{SpanContext: *shield}))
	}
	ctx, r.span = t.tracer.Start(ctx, name(operation, r.model), o...)
	r.layers = t.meter != nil && r.span.IsRecording() && rand.Float64() < t.c.Layers
	r.labels()
	r.ctx = context.WithValue(ctx, requestKey{}, r)
	return r
}

// labels are made once, as every token has them.
func (r *request) labels() {
	r.record = metric.WithAttributeSet(attribute.NewSet(append(r.attributes(), keyMode.String(r.t.c.Mode))...))
}

func name(operation, model string) string {
	if model == "" {
		return operation
	}
	return operation + " " + model
}

// attributes that a request's span and its metrics have in common.
func (r *request) attributes() []attribute.KeyValue {
	list := []attribute.KeyValue{genai.GenAIOperationNameKey.String(r.operation), genai.GenAIProviderNameKey.String(r.t.c.Provider)}
	if r.model != "" {
		list = append(list, genai.GenAIRequestModel(r.model))
	}
	if r.t.c.Address != "" {
		list = append(list, semconv.ServerAddress(r.t.c.Address), semconv.ServerPort(r.t.c.Port))
	}
	return list
}

// observer is told by the proxy.
type observer struct{ t *Telemetry }

// Observe implements proxy.Observer.
func (o observer) Observe(ctx context.Context, e proxy.Event) {
	if e.Kind == proxy.End && e.Refusal != "" {
		o.t.instruments.refusals.Add(ctx, 1, metric.WithAttributes(semconv.ErrorTypeKey.String(e.Refusal)))
	}
	r := requestOf(ctx)
	if r == nil {
		return
	}
	switch e.Kind {
	case proxy.Accepted:
		r.enter(e)
	case proxy.Asked:
		r.asked(e.Parameters)
	case proxy.Clearing:
		r.clearing(e)
	case proxy.Slot:
		r.granted(e)
	case proxy.Sent:
		r.leaves(e)
	case proxy.FirstByte:
		r.first, r.scanner = e.At, answer.New(e.Header)
	case proxy.Chunk:
		r.scanner.Feed(e.Data)
	case proxy.End:
		r.ended(ctx, e)
	}
}

func (r *request) enter(e proxy.Event) {
	t := r.t
	r.accepted = e.At
	t.total.Add(1)
	t.queued.Add(1)
}

// leaves for the engine. It may do so more than once: a slot that has to be cleared takes a connection of its own.
func (r *request) leaves(e proxy.Event) {
	first := r.sent.IsZero()
	r.sent = e.At
	if !first {
		return
	}
	t := r.t
	t.queued.Add(-1)
	t.active.Add(1)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drain()
	t.admit(r)
}

// admit a request to the ledger. The caller holds mu.
func (t *Telemetry) admit(r *request) {
	if t.requests[&r.account] != nil {
		return
	}
	t.ledger.Enter(&r.account)
	t.requests[&r.account] = r
	if r.layers {
		if t.detailed++; t.detailed == 1 {
			t.meter.Detail(true)
		}
	}
}

// clearing a slot of another tenant's tokens is nobody's work.
func (r *request) clearing(e proxy.Event) {
	t := r.t
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drain()
	t.ledger.Assign(e.Slot, nil)
}

// granted a slot: what is computed for it from now on is this request's. Where the engine chooses one itself, that is not known.
func (r *request) granted(e proxy.Event) {
	t := r.t
	r.slot = e.At
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drain()
	t.admit(r)
	if e.Slot != tenant.AnySlot {
		t.ledger.Assign(e.Slot, &r.account)
	}
}

// ended: a request that was cut may have a graph running, and is closed a moment later.
func (r *request) ended(ctx context.Context, e proxy.Event) {
	t := r.t
	r.end, r.status = e.At, e.Status
	r.failure = failure(ctx, e)
	if r.sent.IsZero() {
		t.queued.Add(-1)
	} else {
		t.active.Add(-1)
	}
	if e.Status >= http.StatusInternalServerError || e.Cut && r.failure != failureCancelled {
		t.failed.Add(1)
		t.c.Errors.Add(e.At, r.failure, r.operation+" request was not answered as it should")
	}
	t.mu.Lock()
	t.drain()
	t.undetail(r)
	if e.Cut && t.meter != nil && !r.sent.IsZero() {
		t.lingering = append(t.lingering, r)
		t.mu.Unlock()
		return
	}
	t.leave(r)
	t.mu.Unlock()
	r.close()
}

// undetail is called once. The caller holds mu.
func (t *Telemetry) undetail(r *request) {
	if r.layers && t.requests[&r.account] != nil {
		if t.detailed--; t.detailed == 0 {
			t.meter.Detail(false)
		}
	}
}

// leave the ledger. The caller holds mu.
func (t *Telemetry) leave(r *request) {
	t.ledger.Leave(&r.account)
	delete(t.requests, &r.account)
	r.closed = true
}

// Types of errors beside those of package reply and HTTP's.
const (
	failureCancelled = "cancelled"    // the client left
	failureBroken    = "engine_ended" // in the middle of the answer
)

// failure is why a request did not get what it asked for.
func failure(ctx context.Context, e proxy.Event) string {
	switch {
	case e.Refusal != "":
		return e.Refusal
	case e.Cut && ctx.Err() != nil:
		return failureCancelled
	case e.Cut:
		return failureBroken
	case e.Status >= http.StatusBadRequest:
		return strconv.Itoa(e.Status)
	}
	return ""
}

// decoded notes what a token cost. It is called while graphs are drained.
func (t *Telemetry) decoded(a *attribution.Account, k attribution.Token) {
	t.window.Token(k.Share)
	r := t.requests[a]
	if r == nil {
		return
	}
	i := t.instruments
	i.tokenWait.Record(r.ctx, k.Wait.Seconds(), r.record)
	i.tokenShare.Record(r.ctx, k.Share, r.record)
	i.tokenTransitions.Record(r.ctx, float64(k.Transitions), r.record)
	i.tokenIO.Record(r.ctx, k.Bytes, r.record)
	if r.span.IsRecording() && len(r.tokens) < maxTokens {
		r.tokens = append(r.tokens, k)
	}
}
