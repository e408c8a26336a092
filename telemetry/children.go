package telemetry

import (
	"context"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/telemetry/attribution"
)

// Attributes of spans, beside those of instruments.
const (
	keyGraphs      = attribute.Key("kvshield.graphs")
	keyTokens      = attribute.Key("kvshield.tokens")
	keyTransitions = attribute.Key("kvshield.transitions")
	keyIO          = attribute.Key("kvshield.transition.io")
	keyWait        = attribute.Key("kvshield.enclave.wait.time")
	keyEnclave     = attribute.Key("kvshield.enclave.time")
	keyShare       = attribute.Key("kvshield.enclave.share")
	keyMissing     = attribute.Key("kvshield.tokens.unattributed")
	keyIndex       = attribute.Key("kvshield.token.index")
)

const maxLayerSpans = 512 // of a request

// cost of a phase.
func cost(p attribution.Phase) []attribute.KeyValue {
	return []attribute.KeyValue{keyGraphs.Int(p.Graphs), keyTokens.Int(p.Tokens), keyTransitions.Int64(int64(p.Transitions)), keyIO.Int64(int64(p.Bytes)),
		keyWait.Float64(p.Wait.Seconds()), keyEnclave.Float64(p.Enclave.Seconds())}
}

// share is the part of a time in which the engine waited for the enclave.
func share(waited, took time.Duration) attribute.KeyValue {
	if took <= 0 {
		return keyShare.Float64(0)
	}
	return keyShare.Float64(min(1, waited.Seconds()/took.Seconds()))
}

func trailing(end time.Time) trace.SpanEndOption { return trace.WithTimestamp(end) }

// children are the spans of a request's phases.
func (r *request) children(c clock) {
	leaves := r.end
	if !r.sent.IsZero() {
		leaves = r.sent
	}
	if !r.slot.IsZero() {
		leaves = r.slot
	}
	r.child("queue", r.accepted, leaves)
	p, d := r.account.Prefill, r.account.Decode
	if p.Graphs == 0 {
		r.seen()
		return
	}
	spans := [2]context.Context{}
	var prefill, decode trace.Span
	spans[0], prefill = r.start("prefill", c.at(p.Start))
	prefill.SetAttributes(append(cost(p), share(p.Waited, p.End-p.Start))...)
	prefill.End(trailing(c.at(p.End)))
	if d.Graphs > 0 {
		spans[1], decode = r.start("decode", c.at(p.End))
		decode.SetAttributes(append(cost(d), share(d.Waited, d.End-p.End))...)
		for i, k := range r.tokens {
			decode.AddEvent("token", trace.WithTimestamp(c.at(k.End)), trace.WithAttributes(keyIndex.Int(i+1), keyTransitions.Int(k.Transitions),
				keyIO.Int64(int64(k.Bytes)), keyWait.Float64(k.Wait.Seconds()), keyEnclave.Float64(k.Enclave.Seconds()), keyShare.Float64(k.Share)))
		}
		decode.End(trailing(c.at(d.End)))
	}
	r.layerSpans(c, spans)
}

// seen are the phases of a request of whose graphs nothing is known, as far as a stream shows them.
func (r *request) seen() {
	if r.sent.IsZero() || r.scanner == nil || !r.scanner.Streamed() {
		return
	}
	r.child("prefill", r.sent, r.first)
	r.child("decode", r.first, r.end)
}

func (r *request) start(name string, at time.Time) (context.Context, trace.Span) {
	return r.t.tracer.Start(trace.ContextWithSpan(context.Background(), r.span), name, trace.WithTimestamp(at))
}

func (r *request) child(name string, from, to time.Time) {
	_, s := r.start(name, from)
	s.End(trailing(to))
}

// layerSpans are those of the transitions of a request's first graphs.
func (r *request) layerSpans(c clock, parents [2]context.Context) {
	left := maxLayerSpans
	for _, step := range r.account.Steps {
		parent := parents[number(step.Decode)]
		if parent == nil { // its graph turned out to be the other phase's
			parent = parents[0]
		}
		for _, k := range step.Graph.Detail {
			if left--; left < 0 {
				return
			}
			_, s := r.t.tracer.Start(parent, layerName(k), trace.WithTimestamp(c.at(k.Start)), trace.WithAttributes(keyIO.Int64(int64(k.Bytes)), keyEnclave.Float64(k.Enclave.Seconds())))
			s.End(trailing(c.at(k.Start + k.Wait)))
		}
	}
}

// layersMax is how many layers hooks know of; a transition beyond is no layer's.
const layersMax = 1024

func layerName(k meter.Transition) string {
	if k.Layer < 0 || k.Layer >= layersMax {
		return "batch"
	}
	return fmt.Sprintf("layer %d", k.Layer)
}
