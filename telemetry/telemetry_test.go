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

	"go.uber.org/goleak"

	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/internal/collector"
	"github.com/kvshield/kvshield/proxy"
	"github.com/kvshield/kvshield/telemetry/live"
)

func TestMain(m *testing.M) {
	os.Setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
	os.Setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
	goleak.VerifyTestMain(m)
}

const patience = 20 * time.Second

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
	now := monotonic()
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

func monotonic() time.Duration { return time.Duration(time.Now().UnixNano()) - newClock().offset }

// bench is a proxy with telemetry before an engine that a test writes.
type bench struct {
	*Telemetry
	hook     *hook
	receiver *collector.Receiver
	front    *httptest.Server
	logs     *strings.Builder
}

func begin(t *testing.T, c Config, engine http.HandlerFunc) *bench {
	t.Helper()
	b := &bench{hook: &hook{}, logs: &strings.Builder{}}
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

const finalEvent = `data: {"choices":[{"finish_reason":"length","delta":{}}],"id":"c-1","model":"demo","timings":{"cache_n":4,"prompt_n":5,"predicted_n":3}}` + "\n\n"

// generating is an engine that computes a prompt of five tokens and two more.
func (b *bench) generating(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	w.Header().Set("Content-Type", "text/event-stream")
	b.hook.compute(5)
	io.WriteString(w, "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n")
	w.(http.Flusher).Flush()
	b.hook.compute(1)
	b.hook.compute(1)
	io.WriteString(w, finalEvent)
}

func TestARequestsSpanAndMetrics(t *testing.T) {
	var b *bench
	parent := make(chan string, 1)
	b = begin(t, Config{Model: "demo.gguf", Address: "127.0.0.1", Port: 8080}, func(w http.ResponseWriter, r *http.Request) {
		parent <- r.Header.Get("Traceparent") + " " + r.Header.Get("Tracestate")
		b.generating(w, r)
	})
	b.Shielding("demo.gguf")(nil)
	resp, err := b.post(t, t.Context(), "/v1/chat/completions", `{"model":"anything","max_tokens":3,"temperature":1,"stream":true,"messages":[]}`)
	if err != nil {
		t.Fatal(err)
	}
	request, children := b.span(t, "chat demo.gguf")
	if request.Trace != clientTrace || request.Parent != clientSpan {
		t.Errorf("it is in trace %s below %s", request.Trace, request.Parent)
	}
	own := "00-" + clientTrace + "-" + request.ID + "-01"
	if got := <-parent; got != own+" vendor=1" || resp.Header.Get("Traceresponse") != own {
		t.Errorf("the engine was told %q, the client %q", got, resp.Header.Get("Traceresponse"))
	}
	for key, want := range map[string]any{
		"gen_ai.operation.name": "chat", "gen_ai.provider.name": "llama.cpp", "gen_ai.request.model": "demo.gguf", "server.address": "127.0.0.1", "server.port": int64(8080),
		"gen_ai.request.max_tokens": int64(3), "gen_ai.request.temperature": 1.0, "gen_ai.request.stream": true,
		"gen_ai.usage.input_tokens": int64(9), "gen_ai.usage.output_tokens": int64(3), "gen_ai.usage.cache_read.input_tokens": int64(4),
		"gen_ai.response.id": "c-1", "gen_ai.response.model": "demo", "http.response.status_code": int64(200), "kvshield.transitions": int64(9), "kvshield.tokens": int64(7),
	} {
		if request.Attributes[key] != want {
			t.Errorf("%s is %v, want %v", key, request.Attributes[key], want)
		}
	}
	shield, _ := b.span(t, "shield demo.gguf")
	if len(request.Links) != 1 || request.Links[0] != shield.ID || shield.Trace == request.Trace {
		t.Errorf("links %q, the shield's span is %s", request.Links, shield.ID)
	}
	if p, d := children["prefill"], children["decode"]; p.Attributes["kvshield.tokens"] != int64(5) || d.Attributes["kvshield.tokens"] != int64(2) || len(d.Events) != 2 || len(children) != 3 {
		t.Errorf("%+v", children)
	}
	text := b.scraped(t)
	has(t, text, "kvshield_transitions_total", 6, `kvshield_phase="decode"`, `gen_ai_request_model="demo.gguf"`)
	has(t, text, "kvshield_transitions_total", 3, `kvshield_phase="prefill"`)
	has(t, text, "kvshield_token_io_bytes_sum", 600)
	has(t, text, "kvshield_transition_duration_seconds_count", 9)
	has(t, text, "gen_ai_server_request_duration_seconds_count", 1, `gen_ai_operation_name="chat"`)
	has(t, text, "gen_ai_server_time_to_first_token_seconds_count", 1)
	has(t, text, "gen_ai_client_token_usage_sum", 9, `gen_ai_token_type="input"`)
	for end := time.Now().Add(patience); b.receiver.Metrics()["kvshield.transition.duration"] == nil || b.receiver.Metrics()["kvshield.token.enclave.share"] == nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("by OTLP came %v", b.receiver.Metrics())
		}
	}
}

func TestHowRequestsFail(t *testing.T) {
	for name, test := range map[string]struct {
		path    string
		engine  http.HandlerFunc
		failure string
		failed  uint64
	}{
		"refused by the engine": {"/completion", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(400) }, "400", 0},
		"it ends in mid-answer": {"/completion", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			io.WriteString(w, "data: {}\n\n")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, "engine_ended", 1},
		"it ends before it answers": {"/completion", func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, "server_error", 1},
	} {
		t.Run(name, func(t *testing.T) {
			errors := &live.Errors{}
			b := begin(t, Config{Model: "demo.gguf", Errors: errors}, test.engine)
			b.post(t, t.Context(), test.path, `{}`)
			request, _ := b.span(t, "text_completion")
			if request.Attributes["error.type"] != test.failure {
				t.Errorf("%v", request.Attributes)
			}
			s := b.snapshot()
			if s.Requests.Failed != test.failed || s.Requests.Total != 1 || s.Requests.Active != 0 || s.Requests.Queued != 0 || len(errors.List()) != int(test.failed) {
				t.Errorf("%+v, %+v", s.Requests, errors.List())
			}
			has(t, b.scraped(t), "gen_ai_server_request_duration_seconds_count", 1, `error_type="`+test.failure+`"`)
		})
	}
}

// What a request that was cancelled left running is its own.
func TestCancelledRequest(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var b *bench
	b = begin(t, Config{Model: "demo.gguf"}, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body) // else a server does not notice that its client leaves
		w.Header().Set("Content-Type", "text/event-stream")
		b.hook.compute(5)
		io.WriteString(w, "data: {}\n\n")
		w.(http.Flusher).Flush()
		cancel()
		<-r.Context().Done()
		b.hook.compute(1)
	})
	b.post(t, ctx, "/completion", `{}`)
	request, children := b.span(t, "text_completion")
	if request.Attributes["error.type"] != "cancelled" || children["decode"].Attributes["kvshield.tokens"] != int64(1) {
		t.Errorf("%+v, %+v", request, children)
	}
}

func TestRefusalsAreCounted(t *testing.T) {
	b := begin(t, Config{}, func(w http.ResponseWriter, r *http.Request) {})
	b.post(t, t.Context(), "/kvshield/nothing", "")
	has(t, b.scraped(t), "kvshield_refusals_total", 1, `error_type="not_found_error"`)
}

// Layers are asked of the hook only while a request is in flight that has spans for them.
func TestSpansOfLayers(t *testing.T) {
	var b *bench
	b = begin(t, Config{Model: "demo.gguf", Layers: 1}, func(w http.ResponseWriter, r *http.Request) { b.generating(w, r) })
	b.post(t, t.Context(), "/tokenize", `{}`)
	if len(b.hook.detail) != 0 {
		t.Errorf("detail %v without a request to the model", b.hook.detail)
	}
	b.post(t, t.Context(), "/completion", `{}`)
	_, children := b.span(t, "text_completion")
	if got := fmt.Sprint(b.hook.detail); got != "[true false]" {
		t.Errorf("detail was turned %s", got)
	}
	below := map[string]int{}
	for _, s := range b.receiver.Spans() {
		for _, phase := range []string{"prefill", "decode"} {
			if s.Parent == children[phase].ID {
				below[phase+" "+s.Name]++
			}
		}
	}
	for name, want := range map[string]int{"prefill batch": 1, "prefill layer 0": 1, "decode layer 0": 2, "decode layer 1": 2} {
		if below[name] != want {
			t.Errorf("%v", below)
		}
	}
}

// Where the engine's totals are all that is known, they are counted.
func TestTotalsOnly(t *testing.T) {
	h := &hook{}
	b := begin(t, Config{Engine: totalsOnly{h}}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/x-ndjson")
		io.WriteString(w, `{"model":"m:latest","done":true,"prompt_eval_count":3,"eval_count":4}`+"\n")
	})
	b.second(time.Now())
	h.compute(4)
	b.post(t, t.Context(), "/api/generate", `{"model":"m:latest"}`)
	b.second(time.Now())
	request, children := b.span(t, "text_completion m:latest")
	if request.Attributes["gen_ai.usage.output_tokens"] != int64(4) || request.Attributes["gen_ai.request.model"] != "m:latest" || len(children) != 3 {
		t.Errorf("%+v, %+v", request, children)
	}
	text := b.scraped(t)
	has(t, text, "kvshield_transitions_total", 3, `kvshield_phase="unknown"`)
	has(t, text, "gen_ai_client_token_usage_sum", 4, `gen_ai_request_model="m:latest"`)
	if s := b.snapshot(); s.Tokens.Total != 4 || s.Transition.P50 == 0 {
		t.Errorf("%+v", s)
	}
}

func TestNoTelemetry(t *testing.T) {
	var none *Telemetry
	h := http.NewServeMux()
	if none.Handler(h) != http.Handler(h) || none.Attach(proxy.Config{}).Observer != nil {
		t.Error("something was put in the way")
	}
	none.Shielding("m")(nil)
	none.Close()
}

// Without a receiver no span is made, and what the client says of its trace passes on as it was.
func TestWithoutAReceiver(t *testing.T) {
	parent := make(chan string, 1)
	t.Setenv("OTEL_TRACES_EXPORTER", "none")
	b := begin(t, Config{Model: "demo.gguf"}, func(w http.ResponseWriter, r *http.Request) { parent <- r.Header.Get("Traceparent") })
	resp, err := b.post(t, t.Context(), "/completion", `{}`)
	if err != nil || resp.Header.Get("Traceresponse") != "" {
		t.Errorf("%v, %v", resp, err)
	}
	if got := <-parent; got != "00-"+clientTrace+"-"+clientSpan+"-01" {
		t.Errorf("the engine was told %q", got)
	}
	if b.pipeline.Traced {
		t.Error("spans go somewhere")
	}
}

func TestLayersGoOnWhereAnEngineWasStartedAgain(t *testing.T) {
	var s layerSums
	one := func(n uint64) []meter.Layer { return []meter.Layer{{Transitions: n, Wait: time.Duration(n)}} }
	for i, test := range []struct {
		now  []meter.Layer
		want uint64
	}{{nil, 0}, {one(5), 5}, {one(7), 7}, {nil, 7}, {one(3), 10}, {one(2), 12}, {one(4), 14}} {
		got := s.add(test.now)
		var n uint64
		if len(got) > 0 {
			n = got[0].Transitions
		}
		if n != test.want {
			t.Errorf("step %d: %d, want %d", i, n, test.want)
		}
	}
}
