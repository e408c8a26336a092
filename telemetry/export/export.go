// Package export sets OpenTelemetry up: spans and metrics by OTLP to whoever is configured, and a page for Prometheus.
//
// Start with [Start]; give what it returns to whoever measures; end with [Pipeline.Close], which sends what is left.
//
// OTLP is off unless an endpoint is given, in [Config] or by the standard variables (OTEL_EXPORTER_OTLP_ENDPOINT and those for one
// signal, or OTEL_TRACES_EXPORTER=otlp). These decide about the rest too: protocol, headers, certificates, sampler, intervals, resource. Without
// OTLP no span is recorded, and none costs anything.
package export

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// Config of a pipeline.
type Config struct {
	Endpoint  string // of an OTLP receiver, such as http://127.0.0.1:4318; empty: what the variables say
	Version   string // of this program
	Log       *slog.Logger
	Producers []sdkmetric.Producer // of metrics that no instrument counts
	Getenv    func(string) string  // nil: os.Getenv. The exporters themselves read the real environment
}

// Pipeline takes spans and metrics.
type Pipeline struct {
	Tracers    trace.TracerProvider
	Meters     metric.MeterProvider
	Prometheus http.Handler // the metrics, as OpenMetrics where the client takes that
	Traced     bool         // spans go somewhere

	closers []func(context.Context) error
}

// Start sets a pipeline up. Nothing is sent yet, so a receiver that is away is no error.
func Start(ctx context.Context, c Config) (*Pipeline, error) {
	if c.Getenv == nil {
		c.Getenv = os.Getenv
	}
	to, err := destination(c.Endpoint, c.Getenv)
	if err != nil {
		return nil, err
	}
	about, err := aboutThis(ctx, c.Version)
	if err != nil {
		return nil, err
	}
	otel.SetErrorHandler(&errorLog{log: c.Log})
	p := &Pipeline{Tracers: noop.NewTracerProvider()}
	if err := p.meter(ctx, c, to, about); err != nil {
		return nil, err
	}
	if err := p.trace(ctx, to, about); err != nil {
		return nil, errors.Join(err, p.Close(ctx))
	}
	return p, nil
}

func (p *Pipeline) meter(ctx context.Context, c Config, to destinations, about *resource.Resource) error {
	registry := prometheus.NewRegistry()
	options := []otelprometheus.Option{otelprometheus.WithRegisterer(registry), otelprometheus.WithoutScopeInfo()}
	for _, producer := range c.Producers {
		options = append(options, otelprometheus.WithProducer(producer))
	}
	scraped, err := otelprometheus.New(options...)
	if err != nil {
		return fmt.Errorf("cannot set up metrics for Prometheus: %w", err)
	}
	readers := []sdkmetric.Option{sdkmetric.WithResource(about), sdkmetric.WithReader(scraped)}
	if to.metrics != nil {
		exporter, err := to.metrics.metricExporter(ctx)
		if err != nil {
			return fmt.Errorf("cannot set up metrics by OTLP: %w", err)
		}
		var options []sdkmetric.PeriodicReaderOption
		for _, producer := range c.Producers {
			options = append(options, sdkmetric.WithProducer(producer))
		}
		readers = append(readers, sdkmetric.WithReader(sdkmetric.NewPeriodicReader(exporter, options...)))
	}
	provider := sdkmetric.NewMeterProvider(readers...)
	p.Meters, p.Prometheus = provider, promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true})
	p.closers = append(p.closers, provider.Shutdown)
	return nil
}

func (p *Pipeline) trace(ctx context.Context, to destinations, about *resource.Resource) error {
	if to.traces == nil {
		return nil
	}
	exporter, err := to.traces.spanExporter(ctx)
	if err != nil {
		return fmt.Errorf("cannot set up traces by OTLP: %w", err)
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithResource(about), sdktrace.WithBatcher(exporter))
	p.Tracers, p.Traced = provider, true
	p.closers = append(p.closers, provider.Shutdown)
	return nil
}

// Close sends what is left, for as long as ctx lets it.
func (p *Pipeline) Close(ctx context.Context) error {
	var all []error
	for _, f := range p.closers {
		all = append(all, f(ctx))
	}
	return errors.Join(all...)
}

func aboutThis(ctx context.Context, version string) (*resource.Resource, error) {
	r, err := resource.New(ctx,
		resource.WithSchemaURL(semconv.SchemaURL),
		resource.WithAttributes(semconv.ServiceName("kvshield"), semconv.ServiceVersion(version)),
		resource.WithTelemetrySDK(),
		resource.WithHost(),
		resource.WithFromEnv(),
	)
	if err != nil && !errors.Is(err, resource.ErrPartialResource) && !errors.Is(err, resource.ErrSchemaURLConflict) {
		return nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	return r, nil
}

// errorLog says why nothing arrives, once in a while: a receiver that is away is so for every batch.
type errorLog struct {
	log  *slog.Logger
	mu   sync.Mutex
	last time.Time
}

const errorEvery = time.Minute

func (l *errorLog) Handle(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.last) < errorEvery {
		return
	}
	l.last = time.Now()
	l.log.Warn("telemetry could not be sent", "error", err)
}
