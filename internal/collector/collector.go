// Package collector is an OTLP receiver for tests: it decodes what OpenTelemetry's exporters send, by HTTP and by gRPC, and keeps it.
//
// Start with [Start].
package collector

import (
	"compress/gzip"
	"context"
	"encoding/hex"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	metrics "go.opentelemetry.io/proto/otlp/metrics/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// Receiver of OTLP.
type Receiver struct {
	HTTP, GRPC string // addresses, as http://host:port

	mu      sync.Mutex
	spans   []*trace.Span
	metrics []*metrics.Metric
	raw     [][]byte
	closers []func()
}

// Start receives on two ports of this machine.
func Start() (*Receiver, error) {
	r := &Receiver{}
	for _, serve := range []func(net.Listener){r.serveHTTP, r.serveGRPC} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			r.Close()
			return nil, err
		}
		serve(l)
	}
	return r, nil
}

// Close stops receiving.
func (r *Receiver) Close() {
	for _, f := range r.closers {
		f()
	}
}

func (r *Receiver) serveHTTP(l net.Listener) {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/traces", func(w http.ResponseWriter, in *http.Request) {
		answer(w, in, &collectortrace.ExportTraceServiceRequest{}, r.takeSpans, &collectortrace.ExportTraceServiceResponse{})
	})
	mux.HandleFunc("POST /v1/metrics", func(w http.ResponseWriter, in *http.Request) {
		answer(w, in, &collectormetrics.ExportMetricsServiceRequest{}, r.takeMetrics, &collectormetrics.ExportMetricsServiceResponse{})
	})
	s := &http.Server{Handler: mux}
	r.HTTP = "http://" + l.Addr().String()
	r.closers = append(r.closers, func() { s.Close() })
	go s.Serve(l)
}

func answer[Q, A proto.Message](w http.ResponseWriter, in *http.Request, q Q, take func(Q), a A) {
	var body io.Reader = in.Body
	var err error
	if in.Header.Get("Content-Encoding") == "gzip" {
		if body, err = gzip.NewReader(in.Body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	text, err := io.ReadAll(body)
	if err == nil {
		err = proto.Unmarshal(text, q)
	}
	if err != nil || in.Header.Get("Content-Type") != "application/x-protobuf" {
		http.Error(w, "not OTLP as protobuf", http.StatusBadRequest)
		return
	}
	take(q)
	text, _ = proto.Marshal(a)
	w.Header().Set("Content-Type", "application/x-protobuf")
	w.Write(text)
}

type traceService struct {
	collectortrace.UnimplementedTraceServiceServer
	r *Receiver
}

func (s traceService) Export(_ context.Context, q *collectortrace.ExportTraceServiceRequest) (*collectortrace.ExportTraceServiceResponse, error) {
	s.r.takeSpans(q)
	return &collectortrace.ExportTraceServiceResponse{}, nil
}

type metricsService struct {
	collectormetrics.UnimplementedMetricsServiceServer
	r *Receiver
}

func (s metricsService) Export(_ context.Context, q *collectormetrics.ExportMetricsServiceRequest) (*collectormetrics.ExportMetricsServiceResponse, error) {
	s.r.takeMetrics(q)
	return &collectormetrics.ExportMetricsServiceResponse{}, nil
}

func (r *Receiver) serveGRPC(l net.Listener) {
	s := grpc.NewServer()
	collectortrace.RegisterTraceServiceServer(s, traceService{r: r})
	collectormetrics.RegisterMetricsServiceServer(s, metricsService{r: r})
	r.GRPC = "http://" + l.Addr().String()
	r.closers = append(r.closers, s.Stop)
	go s.Serve(l)
}

func (r *Receiver) takeSpans(q *collectortrace.ExportTraceServiceRequest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keep(q)
	for _, resource := range q.ResourceSpans {
		for _, scope := range resource.ScopeSpans {
			r.spans = append(r.spans, scope.Spans...)
		}
	}
}

func (r *Receiver) takeMetrics(q *collectormetrics.ExportMetricsServiceRequest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keep(q)
	for _, resource := range q.ResourceMetrics {
		for _, scope := range resource.ScopeMetrics {
			r.metrics = append(r.metrics, scope.Metrics...)
		}
	}
}

func (r *Receiver) keep(m proto.Message) {
	if text, err := proto.Marshal(m); err == nil {
		r.raw = append(r.raw, text)
	}
}

// Raw is all that came, as it was sent.
func (r *Receiver) Raw() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Concat(r.raw...)
}

// Span is one span, in a form that tests can ask.
type Span struct {
	Name              string
	Trace, ID, Parent string
	Kind              trace.Span_SpanKind
	Start, End        time.Time
	Attributes        map[string]any
	Links             []string // identifiers of spans
	Status            trace.Status_StatusCode
	Events            []Event
}

// Event of a span.
type Event struct {
	Name       string
	Attributes map[string]any
}

// Spans that came so far.
func (r *Receiver) Spans() []Span {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []Span
	for _, s := range r.spans {
		out := Span{Name: s.Name, Trace: hex.EncodeToString(s.TraceId), ID: hex.EncodeToString(s.SpanId), Parent: hex.EncodeToString(s.ParentSpanId), Kind: s.Kind,
			Start: time.Unix(0, int64(s.StartTimeUnixNano)), End: time.Unix(0, int64(s.EndTimeUnixNano)), Attributes: attributes(s.Attributes), Status: s.GetStatus().GetCode()}
		for _, l := range s.Links {
			out.Links = append(out.Links, hex.EncodeToString(l.SpanId))
		}
		for _, e := range s.Events {
			out.Events = append(out.Events, Event{e.Name, attributes(e.Attributes)})
		}
		list = append(list, out)
	}
	return list
}

func attributes(list []*common.KeyValue) map[string]any {
	m := map[string]any{}
	for _, kv := range list {
		switch v := kv.Value.GetValue().(type) {
		case *common.AnyValue_StringValue:
			m[kv.Key] = v.StringValue
		case *common.AnyValue_IntValue:
			m[kv.Key] = v.IntValue
		case *common.AnyValue_DoubleValue:
			m[kv.Key] = v.DoubleValue
		case *common.AnyValue_BoolValue:
			m[kv.Key] = v.BoolValue
		case *common.AnyValue_ArrayValue:
			var items []string
			for _, i := range v.ArrayValue.Values {
				items = append(items, i.GetStringValue())
			}
			m[kv.Key] = items
		}
	}
	return m
}

// Metrics are the names of those that came so far.
func (r *Receiver) Metrics() map[string]*metrics.Metric {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := map[string]*metrics.Metric{}
	for _, one := range r.metrics {
		m[one.Name] = one
	}
	return m
}

// Await calls f with the spans that came until it is true, or the patience is over.
func (r *Receiver) Await(patience time.Duration, f func([]Span) bool) bool {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if f(r.Spans()) {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}
