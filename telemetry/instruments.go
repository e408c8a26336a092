package telemetry

import (
	"context"
	"errors"
	"slices"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	genai "go.opentelemetry.io/otel/semconv/v1.41.0"
	"go.opentelemetry.io/otel/semconv/v1.41.0/genaiconv"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"

	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/telemetry/attribution"
)

// Attributes of kvshield's own.
const (
	keyMode     = attribute.Key("kvshield.mode")
	keyPhase    = attribute.Key("kvshield.phase")
	keyLayer    = attribute.Key("kvshield.layer")
	keyTEE      = attribute.Key("kvshield.tee")
	keyHardware = attribute.Key("kvshield.tee.hardware")
)

// Boundaries: those of GenAI's conventions, and for what the enclave costs finer ones.
var (
	boundsDuration   = []float64{.01, .02, .04, .08, .16, .32, .64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92}
	boundsFirst      = []float64{.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10}
	boundsEach       = []float64{.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5}
	boundsUsage      = []float64{1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864}
	boundsWait       = []float64{1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, .1, .25, .5, 1}
	boundsShare      = []float64{.01, .02, .05, .1, .15, .2, .25, .3, .4, .5, .6, .7, .8, .9, 1}
	boundsTransition = []float64{1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256}
	boundsIO         = []float64{1 << 10, 1 << 12, 1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 22, 1 << 24, 1 << 26}
)

// instruments of a run.
type instruments struct {
	duration, first, each                            metric.Float64Histogram
	usage                                            metric.Int64Histogram
	transitions, io                                  metric.Int64Counter
	wait, enclave                                    metric.Float64Counter
	tokenWait, tokenShare, tokenTransitions, tokenIO metric.Float64Histogram
	refusals, unattributed                           metric.Int64Counter

	phases [3]metric.MeasurementOption // of each attribution.Class
	layers layerSums                   // under the telemetry's lock
}

// maker collects errors, so that instruments can be listed.
type maker struct {
	metric.Meter
	errs []error
}

func (m *maker) histogram(name, unit, about string, bounds []float64) metric.Float64Histogram {
	h, err := m.Float64Histogram(name, metric.WithUnit(unit), metric.WithDescription(about), metric.WithExplicitBucketBoundaries(bounds...))
	m.errs = append(m.errs, err)
	return h
}

func (m *maker) counter(name, unit, about string) metric.Int64Counter {
	c, err := m.Int64Counter(name, metric.WithUnit(unit), metric.WithDescription(about))
	m.errs = append(m.errs, err)
	return c
}

func (m *maker) seconds(name, about string) metric.Float64Counter {
	c, err := m.Float64Counter(name, metric.WithUnit("s"), metric.WithDescription(about))
	m.errs = append(m.errs, err)
	return c
}

func (t *Telemetry) newInstruments() (*instruments, error) {
	i := &instruments{}
	g := &maker{Meter: t.pipeline.Meters.Meter(scopeGenAI, metric.WithInstrumentationVersion(t.c.Version), metric.WithSchemaURL(schemaGenAI))}
	var duration genaiconv.ServerRequestDuration
	var first genaiconv.ServerTimeToFirstToken
	var each genaiconv.ServerTimePerOutputToken
	var usage genaiconv.ClientTokenUsage
	i.duration = g.histogram(duration.Name(), duration.Unit(), duration.Description(), boundsDuration)
	i.first = g.histogram(first.Name(), first.Unit(), first.Description(), boundsFirst)
	i.each = g.histogram(each.Name(), each.Unit(), each.Description(), boundsEach)
	var err error
	i.usage, err = g.Int64Histogram(usage.Name(), metric.WithUnit(usage.Unit()), metric.WithDescription(usage.Description()), metric.WithExplicitBucketBoundaries(boundsUsage...))
	m := &maker{Meter: t.pipeline.Meters.Meter(scope, metric.WithInstrumentationVersion(t.c.Version), metric.WithSchemaURL(semconv.SchemaURL))}
	i.transitions = m.counter("kvshield.transitions", "{transition}", "Entries into the enclave and back.")
	i.io = m.counter("kvshield.transition.io", "By", "Bytes that went into the enclave.")
	i.wait = m.seconds("kvshield.enclave.wait.time", "Time for which engines waited for the enclave, copies included.")
	i.enclave = m.seconds("kvshield.enclave.time", "Of that, time for which the enclave worked.")
	i.tokenWait = m.histogram("kvshield.token.enclave.wait", "s", "Time for which the engine waited for the enclave, for a decoded token.", boundsWait)
	i.tokenShare = m.histogram("kvshield.token.enclave.share", "1", "Part of a decoded token's time for which the engine waited for the enclave.", boundsShare)
	i.tokenTransitions = m.histogram("kvshield.token.transitions", "{transition}", "Transitions in the graph of a decoded token.", boundsTransition)
	i.tokenIO = m.histogram("kvshield.token.io", "By", "Bytes that went into the enclave, for a decoded token.", boundsIO)
	i.refusals = m.counter("kvshield.refusals", "{request}", "Requests that kvshield itself answered with an error.")
	i.unattributed = m.counter("kvshield.graphs.unattributed", "{graph}", "Graphs of which it is not known whose request they were for.")
	for class := range i.phases {
		i.phases[class] = metric.WithAttributeSet(attribute.NewSet(append(t.common(), keyPhase.String(attribution.Class(class).String()))...))
	}
	return i, errors.Join(append(append(g.errs, m.errs...), err, t.observe(m))...)
}

// common are the attributes of what is no single request's.
func (t *Telemetry) common() []attribute.KeyValue {
	list := []attribute.KeyValue{keyMode.String(t.c.Mode)}
	if t.c.Model != "" {
		list = append(list, genai.GenAIRequestModel(t.c.Model))
	}
	return list
}

// booked counts a graph.
func (t *Telemetry) booked(g meter.Graph, class attribution.Class) {
	i, ctx := t.instruments, context.Background()
	o := i.phases[class]
	i.transitions.Add(ctx, int64(g.Transitions), o)
	i.io.Add(ctx, int64(g.Bytes), o)
	i.wait.Add(ctx, g.Wait.Seconds(), o)
	i.enclave.Add(ctx, g.Enclave.Seconds(), o)
	if class != attribution.Unknown {
		return
	}
	i.unattributed.Add(ctx, 1)
	for _, p := range g.Parts {
		if p.Tokens == 1 { // most likely decoded
			t.window.Tokens(1)
		}
	}
}

// counted counts what an engine says in all, where it says nothing of graphs. One that was started again begins anew.
func (i *instruments) counted(now, before meter.Totals) {
	if now.Transitions < before.Transitions {
		before = meter.Totals{}
	}
	ctx, o := context.Background(), i.phases[attribution.Unknown]
	i.transitions.Add(ctx, int64(now.Transitions-before.Transitions), o)
	i.io.Add(ctx, int64(now.Bytes-min(now.Bytes, before.Bytes)), o)
}

// layerSums go on where an engine was started again and counts from 0.
type layerSums struct{ past, last []meter.Layer }

func (s *layerSums) add(now []meter.Layer) []meter.Layer {
	for len(s.last) < len(now) {
		s.last, s.past = append(s.last, meter.Layer{}), append(s.past, meter.Layer{})
	}
	sum := slices.Clone(s.past)
	for i := range s.last {
		var l meter.Layer
		if i < len(now) {
			l = now[i]
		}
		if l.Transitions < s.last[i].Transitions {
			s.past[i].Add(s.last[i])
			sum[i] = s.past[i]
		}
		s.last[i] = l
		sum[i].Add(l)
	}
	return sum
}
