package telemetry

import (
	"go.opentelemetry.io/otel/attribute"
	genai "go.opentelemetry.io/otel/semconv/v1.41.0"

	"github.com/kvshield/kvshield/proxy"
)

// asks are the attributes of what a request asks for.
var asks = map[string]attribute.Key{
	"stream": genai.GenAIRequestStreamKey, "max_tokens": genai.GenAIRequestMaxTokensKey, "temperature": genai.GenAIRequestTemperatureKey,
	"top_p": genai.GenAIRequestTopPKey, "top_k": genai.GenAIRequestTopKKey, "seed": genai.GenAIRequestSeedKey, "choices": genai.GenAIRequestChoiceCountKey,
	"frequency_penalty": genai.GenAIRequestFrequencyPenaltyKey, "presence_penalty": genai.GenAIRequestPresencePenaltyKey,
}

// whole are those whose attribute is a whole number; the other numbers' are not.
var whole = map[string]bool{"max_tokens": true, "seed": true, "choices": true}

// asked notes what the body asks for. It may come when the request is over.
func (r *request) asked(list []proxy.Parameter) {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	if r.closed {
		return
	}
	for _, p := range list {
		if model, ok := p.Value.(string); ok && p.Name == "model" {
			r.named(model)
			continue
		}
		if a, ok := ask(p); ok {
			r.span.SetAttributes(a)
		}
	}
}

// named is a model that the request names. Where one model is served, that is it, whatever clients call it.
func (r *request) named(model string) {
	if r.t.c.Model != "" {
		return
	}
	r.model = model
	r.labels()
	r.span.SetName(name(r.operation, model))
	r.span.SetAttributes(genai.GenAIRequestModel(model))
}

func ask(p proxy.Parameter) (attribute.KeyValue, bool) {
	key, known := asks[p.Name]
	switch v := p.Value.(type) {
	case bool:
		return key.Bool(v), known && p.Name == "stream"
	case int64:
		if whole[p.Name] {
			return key.Int64(v), known
		}
		return key.Float64(float64(v)), known
	case float64:
		return key.Float64(v), known && !whole[p.Name]
	}
	return attribute.KeyValue{}, false
}
