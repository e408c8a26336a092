package telemetry

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// observe registers what is asked for when somebody collects.
func (t *Telemetry) observe(m *maker) error {
	counter := func(name, unit, about string) metric.Int64ObservableCounter {
		c, err := m.Int64ObservableCounter(name, metric.WithUnit(unit), metric.WithDescription(about))
		m.errs = append(m.errs, err)
		return c
	}
	level := func(name, about string) metric.Int64ObservableUpDownCounter {
		c, err := m.Int64ObservableUpDownCounter(name, metric.WithUnit("{request}"), metric.WithDescription(about))
		m.errs = append(m.errs, err)
		return c
	}
	gauge := func(name, about string) metric.Int64ObservableGauge {
		c, err := m.Int64ObservableGauge(name, metric.WithDescription(about))
		m.errs = append(m.errs, err)
		return c
	}
	active := level("kvshield.requests.active", "Requests that the engine has.")
	queued := level("kvshield.requests.queued", "Requests that wait for their turn or a slot.")
	starts := counter("kvshield.engine.starts", "{start}", "Times that the engine was started.")
	shielded := counter("kvshield.models.shielded", "{model}", "Models that were loaded shielded.")
	refused := counter("kvshield.models.refused", "{model}", "Models that were refused.")
	lost := counter("kvshield.graphs.lost", "{graph}", "Graphs whose figures were overwritten before they were read: they are missing in everything that is counted by graph.")
	ready := gauge("kvshield.ready", "1 while requests are answered, else 0.")
	info := gauge("kvshield.info", "Always 1; its attributes say how the run is protected.")
	layer, err := m.Float64ObservableCounter("kvshield.layer.wait.time", metric.WithUnit("s"), metric.WithDescription("Time for which engines waited for the enclave in a layer."))
	if err != nil {
		return err
	}
	_, err = m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s := t.c.State()
		o.ObserveInt64(active, t.active.Load())
		o.ObserveInt64(queued, t.queued.Load())
		o.ObserveInt64(starts, s.Starts)
		o.ObserveInt64(shielded, int64(s.Shielded))
		o.ObserveInt64(refused, int64(s.Refused))
		o.ObserveInt64(ready, number(s.Ready))
		o.ObserveInt64(info, 1, metric.WithAttributes(keyMode.String(t.c.Mode), keyTEE.String(s.TEE), keyHardware.Bool(s.Hardware)))
		if t.meter != nil {
			o.ObserveInt64(lost, int64(t.meter.Totals().Lost))
			t.observeLayers(o, layer)
		}
		return nil
	}, active, queued, starts, shielded, refused, lost, ready, info, layer)
	return err
}

func (t *Telemetry) observeLayers(o metric.Observer, layer metric.Float64Observable) {
	t.mu.Lock()
	sums := t.instruments.layers.add(t.meter.Layers())
	t.mu.Unlock()
	common := t.common()
	for i, l := range sums {
		o.ObserveFloat64(layer, l.Wait.Seconds(), metric.WithAttributeSet(attribute.NewSet(append(common[:len(common):len(common)], keyLayer.Int(i))...)))
	}
}

func number(b bool) int64 {
	if b {
		return 1
	}
	return 0
}
