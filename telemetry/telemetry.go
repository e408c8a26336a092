// Package telemetry tells what each request and each token paid for the enclave: spans and metrics by OpenTelemetry, a page for
// Prometheus, the figures for the built-in page, lines of a log.
//
// Start with [Start]; put [Telemetry.Handler] around the proxy's handler and [Telemetry.Attach] its configuration; end with
// [Telemetry.Close]. A nil *Telemetry does nothing at all. docs/telemetry.md lists every name.
//
// Packages below it do the work: attribution books graphs to requests, answer reads what engines say of their answers, export is the
// set-up of OpenTelemetry, live the last minute, logs the log. Only this package and export import OpenTelemetry's SDK.
//
// Promises: no prompt, no completion and no API key is in anything that leaves here. Of a request there are its path, numbers that
// it asked for, and the model's name. Nothing waits for a receiver.
package telemetry

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/proxy"
	"github.com/kvshield/kvshield/telemetry/attribution"
	"github.com/kvshield/kvshield/telemetry/export"
	"github.com/kvshield/kvshield/telemetry/live"
	"github.com/kvshield/kvshield/telemetry/page"
)

// Scopes of the instruments: GenAI's conventions have a schema of their own.
const (
	scope       = "github.com/kvshield/kvshield/telemetry"
	scopeGenAI  = scope + "/genai"
	schemaGenAI = "https://opentelemetry.io/schemas/gen-ai/1.42.0"
)

// Counter knows what the enclave cost in all.
type Counter interface{ Totals() meter.Totals }

// Meter also knows it of each graph. A *supervisor.Supervisor is one; a Counter that is none has totals only.
type Meter interface {
	Counter
	Graphs() []meter.Graph
	Layers() []meter.Layer
	Detail(on bool)
}

// State is how the run stands.
type State struct {
	Ready             bool
	Reason            string // why not
	Starts            int64  // of the engine
	Shielded, Refused int    // models
	TEE, Statement    string
	Hardware          bool
}

// Config of a run's telemetry.
type Config struct {
	OTLP     string  // endpoint; empty: what the standard variables say
	Layers   float64 // the part of requests that have spans for layers, 0 to 1
	Provider string  // such as "llama.cpp"
	Model    string  // that is served; empty: requests name it
	Mode     string
	Version  string
	Address  string // that clients use, host and port
	Port     int
	Engine   Counter // nil in mode off
	State    func() State
	Errors   *live.Errors // the last ones; nil: none are kept
	Log      *slog.Logger
}

// Telemetry of one run.
type Telemetry struct {
	c           Config
	meter       Meter // nil where there are totals only
	pipeline    *export.Pipeline
	tracer      trace.Tracer
	instruments *instruments
	window      live.Window
	stop        context.CancelFunc
	wg          sync.WaitGroup

	active, queued atomic.Int64
	total, failed  atomic.Uint64
	shield         atomic.Pointer[trace.SpanContext] // of the span in which the model was shielded

	mu        sync.Mutex // held while graphs are drained, so that they are booked in their order
	ledger    attribution.Ledger
	requests  map[*attribution.Account]*request
	lingering []*request // cut, and may have a graph running
	detailed  int        // requests in flight that want layers
	before    meter.Totals
}

// How often graphs are drained, seconds end, and requests that were cut are closed.
const (
	drainEvery  = 200 * time.Millisecond
	secondEvery = time.Second
	lingerFor   = time.Second
	closeWithin = 5 * time.Second
)

// Start begins to measure.
func Start(ctx context.Context, c Config) (*Telemetry, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Errors == nil {
		c.Errors = &live.Errors{}
	}
	t := &Telemetry{c: c, requests: map[*attribution.Account]*request{}}
	t.meter, _ = c.Engine.(Meter)
	var producers []sdkmetric.Producer
	if c.Engine != nil {
		producers = append(producers, &latency{engine: c.Engine, mode: c.Mode, began: time.Now()})
	}
	var err error
	if t.pipeline, err = export.Start(ctx, export.Config{Endpoint: c.OTLP, Version: c.Version, Log: c.Log, Producers: producers}); err != nil {
		return nil, err
	}
	t.tracer = t.pipeline.Tracers.Tracer(scopeGenAI, trace.WithInstrumentationVersion(c.Version), trace.WithSchemaURL(schemaGenAI))
	if t.instruments, err = t.newInstruments(); err != nil {
		return nil, err
	}
	t.ledger.Booked, t.ledger.Decoded = t.booked, t.decoded
	ctx, t.stop = context.WithCancel(context.WithoutCancel(ctx))
	t.wg.Go(func() { t.run(ctx) })
	return t, nil
}

// run does what is due from time to time.
func (t *Telemetry) run(ctx context.Context) {
	drain, second := time.NewTicker(drainEvery), time.NewTicker(secondEvery)
	defer drain.Stop()
	defer second.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-drain.C:
			t.settle(now)
		case now := <-second.C:
			t.second(now)
		}
	}
}

func (t *Telemetry) second(now time.Time) {
	if t.c.Engine == nil {
		t.window.Tick(now, meter.Totals{}, nil)
		return
	}
	totals := t.c.Engine.Totals()
	if t.meter != nil {
		t.window.Tick(now, totals, t.meter.Layers())
		return
	}
	t.mu.Lock()
	t.instruments.counted(totals, t.before)
	t.before = totals
	t.mu.Unlock()
	t.window.Tick(now, totals, nil)
}

// drain books what was computed. The caller holds mu.
func (t *Telemetry) drain() {
	if t.meter != nil {
		t.ledger.Book(t.meter.Graphs())
	}
}

// settle drains, and closes requests that were cut a while ago: what they left running has ended.
func (t *Telemetry) settle(now time.Time) {
	t.mu.Lock()
	t.drain()
	var over []*request
	for len(t.lingering) > 0 && now.Sub(t.lingering[0].end) >= lingerFor {
		over = append(over, t.lingering[0])
		t.leave(t.lingering[0])
		t.lingering = t.lingering[1:]
	}
	t.mu.Unlock()
	for _, r := range over {
		r.close()
	}
}

// Attach has a proxy tell of its requests, and answer on the pages of telemetry.
func (t *Telemetry) Attach(c proxy.Config) proxy.Config {
	if t == nil {
		return c
	}
	c.Observer = proxy.Observers{c.Observer, observer{t}}
	own := page.Handlers(t.snapshot)
	own["/kvshield/metrics"] = http.HandlerFunc(t.scrape)
	for path, h := range c.Own {
		own[path] = h
	}
	c.Own = own
	return c
}

func (t *Telemetry) scrape(w http.ResponseWriter, r *http.Request) {
	t.mu.Lock()
	t.drain()
	t.mu.Unlock()
	t.pipeline.Prometheus.ServeHTTP(w, r)
}

// Close sends what is left.
func (t *Telemetry) Close() {
	if t == nil {
		return
	}
	t.stop()
	t.wg.Wait()
	t.settle(time.Now().Add(lingerFor))
	ctx, cancel := context.WithTimeout(context.Background(), closeWithin)
	defer cancel()
	if err := t.pipeline.Close(ctx); err != nil {
		t.c.Log.Warn("the last telemetry could not be sent", "error", err)
	}
}

var propagator = propagation.TraceContext{}
