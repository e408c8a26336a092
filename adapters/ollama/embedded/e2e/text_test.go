package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

const tokens = 64

// answers are those of all endpoints, by endpoint.
func (s *server) answers(t *testing.T, w way) map[string]string {
	t.Helper()
	out := map[string]string{}
	chat := []object{{"role": "system", "content": "Fellow citizens of the Senate"}, {"role": "user", "content": "and of the House"}}
	for _, stream := range []bool{false, true} {
		for path, request := range map[string]object{
			"/api/generate": {"prompt": w.prompts[0], "options": object{"num_predict": tokens}},
			"/api/chat":     {"messages": chat, "options": object{"num_predict": tokens}},
			// It has settings of its own instead of the model's.
			"/v1/chat/completions": {"messages": chat, "max_tokens": tokens, "temperature": 0, "seed": 1},
		} {
			request["model"], request["stream"] = w.model, stream
			text, err := s.ask(path, request)
			if err != nil {
				t.Fatalf("%s: %v\n%s", path, err, s.log)
			}
			out[fmt.Sprintf("%s stream=%v", path, stream)] = text
		}
	}
	for _, prompt := range w.prompts {
		out[prompt] = s.generate(t, w.model, prompt, object{"num_predict": tokens})
	}
	return out
}

func same(t *testing.T, want, got map[string]string) {
	t.Helper()
	for what, text := range want {
		if got[what] != text {
			t.Errorf("%s:\nstock:    %q\nshielded: %q", what, text, got[what])
		}
	}
}

// Every endpoint says what stock Ollama says, with both engines; after the model has been unloaded and comes back as well.
func TestTextEqualsStock(t *testing.T) {
	want := map[string]map[string]string{}
	inEachWay(t, func(t *testing.T, w way, mode string) {
		key := fmt.Sprint(w)
		if want[key] == nil {
			s := start(t, stock, w.env...)
			want[key] = s.answers(t, w)
			s.stop()
		}
		s := startIn(t, mode, w.env...)
		same(t, want[key], s.answers(t, w))
		s.unload(t, w.model)
		same(t, want[key], s.answers(t, w))
		if !strings.Contains(s.log.String(), w.says) {
			t.Errorf("the log does not say %q", w.says)
		}
	})
}

// Four requests at once are computed in shared batches.
func TestParallelRequests(t *testing.T) {
	inEachWay(t, func(t *testing.T, w way, mode string) {
		all := func(s *server) map[string]string {
			out := map[string]string{}
			var wg sync.WaitGroup
			var mu sync.Mutex
			for _, prompt := range w.prompts {
				wg.Go(func() {
					text, err := s.ask("/api/generate", object{"model": w.model, "prompt": prompt, "stream": false, "options": object{"num_predict": tokens}})
					mu.Lock()
					defer mu.Unlock()
					out[prompt] = text
					if err != nil {
						t.Errorf("%s: %v", prompt, err)
					}
				})
			}
			wg.Wait()
			return out
		}
		env := append([]string{"OLLAMA_NUM_PARALLEL=4"}, w.env...)
		s := start(t, stock, env...)
		want := all(s)
		s.stop()
		same(t, want, all(startIn(t, mode, env...)))
	})
}

// Texts longer than the context: its oldest half is given up, time and again.
//
// Ollama's own engine reads a token's logits while it may already compute the shift, in the same memory, and so says something
// else once in a while, shielded or not. What it says most often is compared.
func TestContextShift(t *testing.T) {
	usual := func(t *testing.T, s *server, w way) map[string]string {
		out := map[string]string{}
		for _, prompt := range w.prompts[:2] {
			times := map[string]int{}
			for range 5 {
				text := s.generate(t, w.model, prompt, object{"num_ctx": 32, "num_predict": tokens})
				if times[text]++; times[text] > times[out[prompt]] {
					out[prompt] = text
				}
			}
		}
		return out
	}
	inEachWay(t, func(t *testing.T, w way, mode string) {
		s := start(t, stock, w.env...)
		want := usual(t, s, w)
		s.stop()
		same(t, want, usual(t, startIn(t, mode, w.env...), w))
	})
}

// Ollama's own engine leaves what a conversation had cached where it is. In the enclave it is wiped when another conversation has
// taken the place, and what is still used stays.
func TestCellsThatAreGivenUp(t *testing.T) {
	for _, w := range []way{ways["Ollama's engine"], ways["Ollama's engine, gemma3"]} {
		talk := func(s *server) map[string]string {
			out := map[string]string{}
			for i, prompt := range append(w.prompts, w.prompts...) {
				out[fmt.Sprint(i, prompt)] = s.generate(t, w.model, prompt, object{"num_predict": tokens})
			}
			return out
		}
		want := talk(start(t, stock, w.env...))
		s := startIn(t, "resident", append([]string{"OLLAMA_DEBUG=1"}, w.env...)...)
		same(t, want, talk(s))
		if n := strings.Count(s.log.String(), "cells that no conversation uses any more are wiped"); n < len(w.prompts) {
			t.Errorf("%s: cells were wiped %d times", w.model, n)
		}
	}
}
