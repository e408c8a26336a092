package telemetry

import (
	"context"

	"go.opentelemetry.io/otel/codes"
	genai "go.opentelemetry.io/otel/semconv/v1.41.0"
	"go.opentelemetry.io/otel/trace"
)

// Shielding begins the span in which an engine loads its model, shielded; requests link to it when it has ended well.
func (t *Telemetry) Shielding(model string) (end func(error)) {
	if t == nil {
		return func(error) {}
	}
	_, span := t.tracer.Start(context.Background(), name("shield", model), trace.WithNewRoot(), trace.WithAttributes(keyMode.String(t.c.Mode)))
	if model != "" {
		span.SetAttributes(genai.GenAIRequestModel(model))
	}
	return func(err error) {
		s := t.c.State()
		span.SetAttributes(keyTEE.String(s.TEE), keyHardware.Bool(s.Hardware))
		if err != nil {
			span.SetStatus(codes.Error, "the engine did not start")
		} else if span.SpanContext().IsValid() {
			at := span.SpanContext()
			t.shield.Store(&at)
		}
		span.End()
	}
}
