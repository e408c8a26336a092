package telemetry

import (
	"log/slog"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	genai "go.opentelemetry.io/otel/semconv/v1.41.0"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"

	"github.com/kvshield/kvshield/telemetry/answer"
)

// close says what a request that has left the ledger was like: by metrics, a line of the log, and its spans.
func (r *request) close() {
	said := answer.Usage{Input: -1, Cached: -1, Output: -1, Processed: -1}
	if r.scanner != nil {
		said = r.scanner.Said()
	}
	r.account.Settle(said.Processed)
	c := newClock()
	first := r.firstToken(c)
	r.measure(said, first)
	if r.t.meter == nil && said.Output > 0 {
		r.t.window.Tokens(said.Output)
	}
	r.log(said)
	if r.span.IsRecording() {
		r.describe(said, first)
		r.children(c)
		r.span.End(trailing(r.end))
	}
}

func (r *request) log(said answer.Usage) {
	list := []slog.Attr{slog.String("operation", r.operation), slog.Int("status", r.status), slog.Float64("seconds", r.end.Sub(r.accepted).Seconds()),
		slog.Uint64("transitions", r.account.Prefill.Transitions+r.account.Decode.Transitions)}
	if said.Output >= 0 {
		list = append(list, slog.Int("input_tokens", said.Input), slog.Int("output_tokens", said.Output))
	}
	if r.failure != "" {
		list = append(list, slog.String("failure", r.failure))
	}
	r.t.c.Log.LogAttrs(r.ctx, slog.LevelInfo, "a request has ended", list...)
}

// firstToken is when there was one; zero when that is not known.
func (r *request) firstToken(c clock) time.Time {
	switch {
	case r.operation != "chat" && r.operation != "text_completion", r.failure != "":
		return time.Time{}
	case r.scanner != nil && r.scanner.Streamed():
		return r.first
	case r.account.Prefill.Graphs > 0:
		return c.at(r.account.Prefill.End)
	}
	return time.Time{}
}

func (r *request) measure(said answer.Usage, first time.Time) {
	i := r.t.instruments
	took := r.end.Sub(r.accepted)
	o := r.record
	if r.failure != "" {
		r.model = r.t.c.Model // not what a client made up
		o = metric.WithAttributes(append(r.attributes(), keyMode.String(r.t.c.Mode), semconv.ErrorTypeKey.String(r.failure))...)
	}
	i.duration.Record(r.ctx, took.Seconds(), o)
	if !first.IsZero() {
		i.first.Record(r.ctx, first.Sub(r.accepted).Seconds(), r.record)
		if said.Output > 1 {
			i.each.Record(r.ctx, r.end.Sub(first).Seconds()/float64(said.Output-1), r.record)
		}
	}
	for kind, n := range map[string]int{"input": said.Input, "output": said.Output} {
		if n >= 0 {
			i.usage.Record(r.ctx, int64(n), r.record, metric.WithAttributes(genai.GenAITokenTypeKey.String(kind)))
		}
	}
}

// describe puts into the span what the answer was like.
func (r *request) describe(said answer.Usage, first time.Time) {
	var list []attribute.KeyValue
	for key, n := range map[attribute.Key]int{genai.GenAIUsageInputTokensKey: said.Input, genai.GenAIUsageOutputTokensKey: said.Output, genai.GenAIUsageCacheReadInputTokensKey: said.Cached} {
		if n >= 0 {
			list = append(list, key.Int(n))
		}
	}
	if said.ID != "" {
		list = append(list, genai.GenAIResponseIDKey.String(said.ID))
	}
	if said.Model != "" {
		list = append(list, genai.GenAIResponseModelKey.String(said.Model))
	}
	if len(said.Finish) > 0 {
		list = append(list, genai.GenAIResponseFinishReasonsKey.StringSlice(said.Finish))
	}
	if !first.IsZero() && r.scanner.Streamed() {
		list = append(list, genai.GenAIResponseTimeToFirstChunkKey.Float64(first.Sub(r.accepted).Seconds()))
	}
	if r.status > 0 {
		list = append(list, semconv.HTTPResponseStatusCode(r.status))
	}
	if r.failure != "" {
		list = append(list, semconv.ErrorTypeKey.String(r.failure))
	}
	if r.status >= 500 || r.failure == failureBroken {
		r.span.SetStatus(codes.Error, "")
	}
	if r.t.meter != nil {
		p := r.account.Prefill
		p.Join(r.account.Decode)
		list = append(list, cost(p)...)
		// The last token that is sampled is not computed any more.
		if missing := said.Processed + said.Output - 1 - p.Tokens; said.Processed >= 0 && said.Output > 0 && missing > 0 {
			list = append(list, keyMissing.Int(missing))
		}
	}
	r.span.SetAttributes(list...)
}
