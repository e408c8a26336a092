package proxy_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/proxy"
)

// Errors are what the clients of the API in question read.
func TestErrorsOfOllamasAPI(t *testing.T) {
	down := func() proxy.State { return proxy.State{Reason: "the engine is starting"} }
	for _, ollama := range []bool{true, false} {
		seen := &recorder{}
		s, _ := frontWith(t, proxy.Config{Dial: dialer(echo(t)), State: down, Ollama: ollama, Observer: proxy.Observers{nil, seen}})
		for path, plain := range map[string]bool{"/api/chat": ollama, "/v1/chat/completions": false} {
			r, text, _ := get(t, s, path)
			want := `{"error":{"message":"the engine is starting;`
			if plain {
				want = `{"error":"the engine is starting;`
			}
			if r.StatusCode != 503 || r.Header.Get("Retry-After") == "" || !strings.HasPrefix(text, want) {
				t.Errorf("ollama %v, %s: %d %s", ollama, path, r.StatusCode, text)
			}
		}
		s.Close()
		if last := seen.events[len(seen.events)-1]; last != "end 503 unavailable_error" {
			t.Errorf("ollama %v: the observer was told %q", ollama, last)
		}
	}
}

// Files are of any size where the engine is Ollama; nothing else is, whatever it looks like.
func TestFilesOfModelsHaveNoLimit(t *testing.T) {
	counting := httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n)
	})
	for _, ollama := range []bool{true, false} {
		s, _ := frontWith(t, proxy.Config{Dial: dialer(counting), State: ready, MaxBody: 1000, Ollama: ollama})
		for target, file := range map[string]bool{
			"POST /api/blobs/sha256:1": true, "PUT /api/blobs/sha256:1": false, "POST /api/blobs/../generate": false, "POST /api/generate": false, "POST /v1/api/blobs/sha256:1": false,
		} {
			method, path, _ := strings.Cut(target, " ")
			r, err := http.NewRequest(method, s.URL+path, struct{ io.Reader }{strings.NewReader(strings.Repeat("x", 100_000))})
			if err != nil {
				t.Fatal(err)
			}
			resp, err := s.Client().Do(r)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			want := 413
			if ollama && file {
				want = 200
			}
			if resp.StatusCode != want || want == 200 && string(body) != "100000" {
				t.Errorf("ollama %v, %s: %d %s", ollama, target, resp.StatusCode, body)
			}
		}
	}
}
