package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const tenantKeys = "alice:sk-alice-000\nbob:sk-bob-00000\ncarol:sk-carol-000\n"

func keyFile(t *testing.T) string { t.Helper(); return keyFileOf(t, tenantKeys) }

// as asks with a key and returns the status and the answer.
func (s *server) as(key, path string, request any) (int, []byte, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return 0, nil, err
	}
	r, err := http.NewRequest("POST", s.url+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	r.Header.Set("Content-Type", "application/json")
	if key != "" {
		r.Header.Set("Authorization", "Bearer "+key)
	}
	resp, err := s.client.Do(r)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}

// cached is how many tokens of the prompt the engine had already, whichever API says so.
func cached(t *testing.T, answer []byte) int {
	t.Helper()
	var a struct {
		Timings *struct {
			CacheN int `json:"cache_n"`
		}
		Usage *struct {
			Read    *int `json:"cache_read_input_tokens"`
			Details *struct {
				Cached int `json:"cached_tokens"`
			} `json:"input_tokens_details"`
		}
	}
	if err := json.Unmarshal(answer, &a); err != nil {
		t.Fatalf("%v in %s", err, answer)
	}
	switch {
	case a.Timings != nil:
		return a.Timings.CacheN
	case a.Usage != nil && a.Usage.Read != nil:
		return *a.Usage.Read
	case a.Usage != nil && a.Usage.Details != nil:
		return a.Usage.Details.Cached
	}
	t.Fatalf("the answer does not say what was cached: %s", answer)
	return 0
}

var tenantText = strings.Repeat("The President of the United States has communicated to the Senate the following treaty. ", 3)

// requests for a prefix, by every path that generates.
var tenantRequests = map[string]map[string]any{
	"/completion":          {"prompt": tenantText, "n_predict": 2},
	"/v1/completions":      {"prompt": tenantText, "max_tokens": 2},
	"/v1/chat/completions": {"messages": []any{map[string]any{"role": "user", "content": tenantText}}, "max_tokens": 2},
	"/v1/messages":         {"messages": []any{map[string]any{"role": "user", "content": tenantText}}, "max_tokens": 2},
	"/v1/responses":        {"input": tenantText, "max_output_tokens": 2},
}

func TestNoPrefixCrossesKeys(t *testing.T) {
	s := startShielded(t, serveOptions{model: demoModel, flags: []string{"--api-key-file", keyFile(t)}, args: []string{"-np", "2"}})
	ask := func(key, path string, request any) int {
		t.Helper()
		status, answer, err := s.as(key, path, request)
		if err != nil || status != 200 {
			t.Fatalf("%s as %s: %d, %s, %v", path, key, status, answer, err)
		}
		return cached(t, answer)
	}
	for path, request := range tenantRequests {
		t.Run(strings.Trim(path, "/"), func(t *testing.T) {
			ask("sk-alice-000", path, request)
			if n := ask("sk-alice-000", path, request); n < 20 {
				t.Errorf("the same key reused %d tokens", n)
			}
			for _, key := range []string{"sk-bob-00000", "sk-carol-000", "sk-bob-00000"} {
				if n := ask(key, path, request); n != 0 {
					t.Errorf("%s reused %d tokens of another key", key, n)
				}
				// Both slots are hers again, and hold the text.
				if status, _, err := s.as("sk-alice-000", "/completion", map[string]any{"prompt": tenantText, "n_predict": 1, "n": 2}); status != 200 || err != nil {
					t.Fatal(status, err)
				}
				ask("sk-alice-000", path, request)
			}
		})
	}
	t.Run("several answers", func(t *testing.T) {
		several := map[string]any{"prompt": tenantText, "n_predict": 2, "n": 2}
		if status, answer, err := s.as("sk-alice-000", "/completion", several); status != 200 || err != nil {
			t.Fatalf("%d %s %v", status, answer, err)
		}
		for range 2 {
			if n := ask("sk-bob-00000", "/completion", tenantRequests["/completion"]); n > 0 {
				t.Errorf("reused %d tokens of another key's slots", n)
			}
			ask("sk-carol-000", "/completion", map[string]any{"prompt": "x", "n_predict": 1})
			if status, _, err := s.as("sk-alice-000", "/completion", several); status != 200 || err != nil {
				t.Fatal(status, err)
			}
		}
	})
	t.Run("a chosen slot", func(t *testing.T) {
		ask("sk-alice-000", "/completion", tenantRequests["/completion"])
		for slot := range 2 {
			body := fmt.Sprintf(`{"id_slot":%d,"id\u005fslot":%d,"slot_id":%d,"prompt":%q,"n_predict":2,"cache_prompt":true}`, slot, slot, slot, tenantText)
			if n := ask("sk-bob-00000", "/completion", json.RawMessage(body)); slot == 0 && n > 0 {
				t.Errorf("reused %d tokens", n)
			}
		}
	})
}

// Under load, with clients that leave in mid-request, too. Each text is new: first one key sends it twice, then another key sends it.
func TestNoPrefixCrossesKeysUnderLoad(t *testing.T) {
	s := startShielded(t, serveOptions{model: demoModel, flags: []string{"--api-key-file", keyFile(t), "--queue", "100"}, args: []string{"-np", "6"}})
	keys := []string{"sk-alice-000", "sk-bob-00000", "sk-carol-000"}
	var wg sync.WaitGroup
	var reused atomic.Int64
	for i := range 6 {
		wg.Go(func() {
			for turn := range 4 {
				text := fmt.Sprintf("%c%c%d: %s", 'A'+i, 'Q'+turn, i*turn, tenantText)
				request := map[string]any{"prompt": text, "n_predict": 3}
				s.abandon(keys[i%3], text, time.Duration(turn)*7*time.Millisecond)
				for n, key := range []string{keys[i%3], keys[i%3], keys[(i+1+turn%2)%3]} {
					status, answer, err := s.as(key, "/completion", request)
					if err != nil || status != 200 {
						t.Errorf("%d %s %v", status, answer, err)
						return
					}
					// The key's own last request may have begun with the same two or three tokens.
					switch c := cached(t, answer); {
					case n == 1 && c > 20:
						reused.Add(1)
					case n == 2 && c > 5:
						t.Errorf("%d tokens of another key were reused", c)
					}
				}
			}
		})
	}
	wg.Wait()
	if reused.Load() == 0 {
		t.Error("nothing was reused by the same key either: this shows nothing")
	}
}

// abandon sends a request and leaves before it is answered.
func (s *server) abandon(key, text string, after time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), after)
	defer cancel()
	body, _ := json.Marshal(map[string]any{"prompt": text, "n_predict": 400, "stream": true})
	r, _ := http.NewRequestWithContext(ctx, "POST", s.url+"/completion", bytes.NewReader(body))
	r.Header.Set("X-Api-Key", key)
	if resp, err := s.client.Do(r); err == nil {
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
}

func TestKeysMayShare(t *testing.T) {
	s := startShielded(t, serveOptions{model: demoModel, flags: []string{"--api-key-file", keyFile(t), "--share-prefix"}, args: []string{"-np", "1"}})
	for i, key := range []string{"sk-alice-000", "sk-bob-00000"} {
		status, answer, err := s.as(key, "/completion", tenantRequests["/completion"])
		if err != nil || status != 200 {
			t.Fatalf("%d %s %v", status, answer, err)
		}
		if n := cached(t, answer); i == 1 && n < 20 {
			t.Errorf("reused %d tokens", n)
		}
	}
}

func TestWhoIsLetIn(t *testing.T) {
	s := startShielded(t, serveOptions{model: demoModel, flags: []string{"--api-key-file", keyFile(t)}})
	for path, want := range map[string]int{"/completion": 401, "/v1/chat/completions": 401, "/slots/0?action=save": 401} {
		if status, answer, _ := s.as("", path, map[string]any{"prompt": "x"}); status != want {
			t.Errorf("POST %s: %d %s", path, status, answer)
		}
	}
	for path, want := range map[string]int{"/health": 200, "/v1/health": 200, "/slots": 401, "/props": 401, "/kvshield/status": 401, "//health": 401, "/v1/models": 401} {
		resp, err := s.client.Get(s.url + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("GET %s: %d, want %d", path, resp.StatusCode, want)
		}
	}
	for path, want := range map[string]int{"/v1/streams/lookup": 403, "/v1/embeddings": 403, "/slots/0?action=erase": 403, "/v1/systemone": 403, "/completion/": 403, "/tokenize": 200} {
		if status, answer, _ := s.as("sk-bob-00000", path, map[string]any{"content": "x"}); status != want || status == 403 && !bytes.Contains(answer, []byte("--")) {
			t.Errorf("POST %s: %d %s", path, status, answer)
		}
	}
	if out := s.log.String(); strings.Contains(out, "sk-") {
		t.Errorf("a key was logged: %s", out)
	}
}
