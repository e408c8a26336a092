package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"
)

// embeddingWay is the name of the way in which models run that make no text: encoders, and what is made of a whole text at once.
const embeddingWay = "embedding"

var embedding = []string{"--embedding", "-c", "512"}

// tryEmbed returns the embeddings of a text's tokens, one after another.
func (s *server) tryEmbed() (all []float64, err error) {
	body, err := s.post("/embedding", map[string]any{"content": archPrompts[0]})
	if err != nil {
		return nil, err
	}
	var answer []struct{ Embedding [][]float64 }
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, err
	}
	for _, a := range answer {
		for _, token := range a.Embedding {
			all = append(all, token...)
		}
	}
	if len(all) == 0 {
		return nil, errors.New("no embedding")
	}
	return all, nil
}

// embedsAlike runs a model under a mode and compares its embeddings with the stock engine's.
func embedsAlike(t *testing.T, model, mode string, want []float64) outcome {
	t.Helper()
	s := launch(t, serveOptions{model: model, mode: mode, args: embedding})
	defer s.stop()
	s.client.Timeout = patience
	var got []float64
	err := s.tryReady()
	if err == nil {
		got, err = s.tryEmbed()
	}
	switch {
	case err != nil:
		return s.notRun(err)
	case len(got) != len(want):
		return outcome{failed: fmt.Sprintf("%d numbers, stock gives %d", len(got), len(want))}
	}
	o := outcome{worst: distance(want, got)}
	if o.exact = o.worst <= 1e-3; !o.exact {
		o.failed = fmt.Sprintf("embeddings off by %.1e", o.worst)
	}
	return o
}
