package e2e

import (
	"encoding/json"
	"os"
	"slices"
	"strconv"
	"testing"
)

// speed is what Ollama says of one answer, in tokens per second.
type speed struct{ prompt, decode float64 }

func (s *server) speed(t *testing.T, n int) speed {
	t.Helper()
	answer, err := s.post("/api/generate", object{"model": "bench", "prompt": "The sea was calm and the sky was clear, and we sat upon the rocks.", "stream": false,
		"keep_alive": "1h", "options": object{"num_predict": n, "num_ctx": 1024}})
	if err != nil {
		t.Fatalf("%v\n%s", err, s.log)
	}
	var a struct {
		EvalCount          int   `json:"eval_count"`
		EvalDuration       int64 `json:"eval_duration"`
		PromptEvalCount    int   `json:"prompt_eval_count"`
		PromptEvalDuration int64 `json:"prompt_eval_duration"`
	}
	if err := json.Unmarshal([]byte(answer), &a); err != nil || a.EvalCount < n/2 {
		t.Fatalf("%v: %s", err, answer)
	}
	return speed{float64(a.PromptEvalCount) / float64(a.PromptEvalDuration) * 1e9, float64(a.EvalCount) / float64(a.EvalDuration) * 1e9}
}

// TestSpeed is no test: it prints how fast the shielded Ollama is beside the stock one, in turns, by Ollama's own figures.
// `make bench-ollama` runs it.
func TestSpeed(t *testing.T) {
	model := os.Getenv("KVSHIELD_BENCH_MODEL")
	if model == "" {
		t.Skip("run `make bench-ollama` for figures")
	}
	rounds, _ := strconv.Atoi(os.Getenv("KVSHIELD_BENCH_ROUNDS"))
	rounds = max(rounds, 5)
	for _, env := range [][]string{nil, {"OLLAMA_NEW_ENGINE=1"}} {
		s := start(t, stock, env...)
		s.client.Timeout = 0
		if err := s.importModel("bench", model, ""); err != nil {
			t.Fatal(err)
		}
		others := map[string]*server{}
		for _, mode := range []string{"permute", "resident"} {
			others[mode] = startIn(t, mode, env...)
			others[mode].client.Timeout = 0
			others[mode].speed(t, 8)
		}
		s.speed(t, 8)
		ratios := map[string][]float64{}
		for range rounds {
			before := s.speed(t, 64).decode
			for _, mode := range []string{"permute", "resident"} {
				got := others[mode].speed(t, 64).decode
				after := s.speed(t, 64).decode
				ratios[mode] = append(ratios[mode], 2*got/(before+after))
				t.Logf("%v %s: stock %.1f, shielded %.1f, stock %.1f tokens/s", env, mode, before, got, after)
				before = after
			}
		}
		for mode, r := range ratios {
			slices.Sort(r)
			t.Logf("%v %s: decode %.3f of stock [%.3f %.3f], %d rounds", env, mode, r[len(r)/2], r[0], r[len(r)-1], rounds)
		}
		s.stop()
		for _, other := range others {
			other.stop()
		}
	}
}
