package main

import (
	"context"
	"log/slog"
	"sync"

	"github.com/kvshield/kvshield/adapters/ollama/client"
	"github.com/kvshield/kvshield/proxy"
)

// answers of Ollama's own API that were complete, as Ollama counts them.
type answers struct {
	Count            int     `json:"count"`
	PromptTokens     int     `json:"prompt_tokens"`
	GeneratedTokens  int     `json:"generated_tokens"`
	LoadSeconds      float64 `json:"load_seconds"`
	PromptSeconds    float64 `json:"prompt_seconds"`
	GeneratedSeconds float64 `json:"generated_seconds"`
}

// tally observes answers that go by, logs what each cost, and sums up.
type tally struct {
	log     *slog.Logger
	mu      sync.Mutex
	total   answers
	running map[uint64]*client.Answer
}

func newTally(log *slog.Logger) *tally {
	return &tally{log: log, running: map[uint64]*client.Answer{}}
}

func generates(path string) bool {
	return path == "/api/generate" || path == "/api/chat" || path == "/api/embed"
}

// Observe implements proxy.Observer.
func (t *tally) Observe(_ context.Context, e proxy.Event) {
	t.mu.Lock()
	a := t.running[e.Request]
	switch {
	case e.Kind == proxy.FirstByte && generates(e.HTTP.URL.Path):
		t.running[e.Request] = &client.Answer{}
	case e.Kind == proxy.End:
		delete(t.running, e.Request)
	}
	t.mu.Unlock()
	switch {
	case a == nil:
	case e.Kind == proxy.Chunk:
		_, _ = a.Write(e.Data) // never fails
	case e.Kind == proxy.End:
		if f, ok := a.Figures(); ok {
			t.add(f)
		}
	}
}

func (t *tally) add(f client.Figures) {
	t.log.Info("answered", "model", f.Model, "prompt_tokens", f.PromptEvalCount, "generated_tokens", f.EvalCount, "load", f.LoadDuration, "prompt", f.PromptEvalDuration,
		"generate", f.EvalDuration, "total", f.TotalDuration)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.total.Count++
	t.total.PromptTokens += f.PromptEvalCount
	t.total.GeneratedTokens += f.EvalCount
	t.total.LoadSeconds += f.LoadDuration.Seconds()
	t.total.PromptSeconds += f.PromptEvalDuration.Seconds()
	t.total.GeneratedSeconds += f.EvalDuration.Seconds()
}

func (t *tally) sum() answers {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.total
}
