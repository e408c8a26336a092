package telemetry

import (
	"context"
	"net/http"
	"testing"

	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/proxy"
)

// What a decoded token costs: its event in the answer's stream, and its graph.
func BenchmarkToken(b *testing.B) {
	b.Setenv("OTEL_TRACES_EXPORTER", "none")
	t, err := Start(b.Context(), Config{Model: "demo.gguf", Mode: "resident", Engine: &hook{}, State: func() State { return State{} }})
	if err != nil {
		b.Fatal(err)
	}
	defer t.Close()
	r := t.begin(context.Background(), "chat", "/v1/chat/completions")
	o := observer{t}
	o.Observe(r.ctx, proxy.Event{Kind: proxy.Accepted})
	o.Observe(r.ctx, proxy.Event{Kind: proxy.Slot})
	o.Observe(r.ctx, proxy.Event{Kind: proxy.Sent})
	o.Observe(r.ctx, proxy.Event{Kind: proxy.FirstByte, Header: http.Header{"Content-Type": {"text/event-stream"}}})
	event := []byte(`data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" the"}}],"created":1795685286,"id":"chatcmpl-wGlUlu3vrpscTRqmcXlbAdp1aEmcptoa","model":"demo.gguf","system_fingerprint":"b1","object":"chat.completion.chunk"}` + "\n\n")
	graphs := []meter.Graph{{Tokens: 1, Transitions: 23, Bytes: 1 << 18, Wait: 1 << 20, Enclave: 1 << 19, Parts: []meter.Part{{Sequence: 0, Tokens: 1}}}}
	for b.Loop() {
		o.Observe(r.ctx, proxy.Event{Kind: proxy.Chunk, Data: event})
		graphs[0].End += 1 << 24
		t.mu.Lock()
		t.ledger.Book(graphs)
		t.mu.Unlock()
	}
}
