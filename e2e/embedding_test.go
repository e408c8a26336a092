package e2e

import "testing"

// A model without a cache leaves nothing behind: every mode runs it as it is.
func TestEmbeddingModelsRun(t *testing.T) {
	model := tiny(t, "bert")
	args := []string{"--embedding", "-c", "512"}
	ask := func(s *server) string {
		answer, err := s.post("/embedding", map[string]any{"content": "At last the sailors"})
		if err != nil {
			t.Fatal(err)
		}
		return string(answer)
	}
	want := ask(startStock(t, model, nil, args...))
	inEachMode(t, func(t *testing.T, mode string) {
		if got := ask(startShielded(t, serveOptions{model: model, mode: mode, args: args})); got != want {
			t.Errorf("embedding %.80s, want %.80s", got, want)
		}
	})
}
