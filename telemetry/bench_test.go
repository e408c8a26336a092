package telemetry

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/internal/collector"
	"github.com/kvshield/kvshield/proxy"
)

// hook counts what a test wants.
type hook struct {
	mu     sync.Mutex
	graphs []meter.Graph
	totals meter.Totals
	layers []meter.Layer
	detail []bool
}

func (h *hook) Graphs() []meter.Graph {
	h.mu.Lock()
	defer h.mu.Unlock()
	list := h.graphs
	h.graphs = nil
	return list
}

func (h *hook) Totals() meter.Totals {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.totals
}

func (h *hook) Layers() []meter.Layer {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.layers
}

func (h *hook) Detail(on bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.detail = append(h.detail, on)
}

// compute a graph of a request's own sequence.
func (h *hook) compute(tokens int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := monotonicNow()
	g := meter.Graph{Start: now, End: now + time.Millisecond, Tokens: tokens, Transitions: 3, Bytes: 300, Wait: 300 * time.Microsecond, Enclave: 100 * time.Microsecond, Parts: []meter.Part{{Sequence: 0, Tokens: tokens}}}
	if n := len(h.detail); n > 0 && h.detail[n-1] {
		g.Detail = []meter.Transition{{Layer: 1<<32 - 1, Start: now, Wait: time.Microsecond}, {Layer: 0, Start: now, Wait: time.Microsecond}, {Layer: 1, Start: now, Wait: time.Microsecond}}
	}
	h.graphs = append(h.graphs, g)
	h.totals.Add(meter.Totals{Transitions: 3, Bytes: 300, Wait: g.Wait, Enclave: g.Enclave})
	h.totals.Histogram[40] += 3
}

// totalsOnly hides that a hook knows graphs.
type totalsOnly struct{ h *hook }

func (t totalsOnly) Totals() meter.Totals { return t.h.Totals() }

// bench is a proxy with telemetry before an engine that a test writes.
type bench struct {
	*Telemetry
	hook     *hook
	receiver *collector.Receiver
	front    *httptest.Server
}

func begin(t *testing.T, c Config, engine http.HandlerFunc) *bench {
	t.Helper()
	b := &bench{hook: &hook{}}
	var err error
	if b.receiver, err = collector.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.receiver.Close)
	if c.Engine == nil {
		c.Engine = b.hook
	}
	c.Provider, c.Mode, c.State = "llama.cpp", "resident", func() State { return State{Ready: true, Starts: 1, TEE: "software"} }
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.OTLP == "" {
		c.OTLP = b.receiver.HTTP
	}
	if b.Telemetry, err = Start(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "telemetry")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: engine}}
	s.Start()
	t.Cleanup(s.Close)
	p := b.Attach(proxy.Config{State: func() proxy.State { return proxy.State{Ready: true} }, Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", l.Addr().String())
	}})
	b.front = httptest.NewServer(b.Telemetry.Handler(proxy.New(p)))
	t.Cleanup(func() { b.front.Close(); b.Telemetry.Close() })
	return b
}

const (
	clientTrace = "0af7651916cd43dd8448eb211c80319c"
	clientSpan  = "b7ad6b7169203331"
)

func (b *bench) post(t *testing.T, ctx context.Context, path, body string) (*http.Response, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, "POST", b.front.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Traceparent", "00-"+clientTrace+"-"+clientSpan+"-01")
	r.Header.Set("Tracestate", "vendor=1")
	resp, err := b.front.Client().Do(r)
	if err == nil {
		_, err = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	return resp, err
}

// span waits for the span of the request and its children.
func (b *bench) span(t *testing.T, prefix string) (collector.Span, map[string]collector.Span) {
	t.Helper()
	var request collector.Span
	children := map[string]collector.Span{}
	if !b.receiver.Await(patience, func(list []collector.Span) bool {
		for _, s := range list {
			if strings.HasPrefix(s.Name, prefix) {
				request = s
			}
		}
		return request.ID != ""
	}) {
		t.Fatalf("no span %q among %+v", prefix, b.receiver.Spans())
	}
	for _, s := range b.receiver.Spans() {
		if s.Parent == request.ID {
			children[s.Name] = s
		}
	}
	return request, children
}

func (b *bench) scraped(t *testing.T) string {
	t.Helper()
	resp, err := b.front.Client().Get(b.front.URL + "/kvshield/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status, err)
	}
	return string(text)
}

// has checks for a sample: a metric, some of its labels, and the value.
func has(t *testing.T, text, name string, value any, labels ...string) {
	t.Helper()
	for line := range strings.Lines(text) {
		found := strings.HasPrefix(line, name+"{") || strings.HasPrefix(line, name+" ")
		for _, l := range labels {
			found = found && strings.Contains(line, l)
		}
		if found && strings.HasSuffix(strings.TrimSpace(line), " "+fmt.Sprint(value)) {
			return
		}
	}
	t.Errorf("no %s with %q and %v in\n%s", name, labels, value, text)
}
