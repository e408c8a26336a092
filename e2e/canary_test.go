package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/internal/collector"
)

const (
	canary    = "canary7f3a9c51"
	canaryKey = "sk-" + canary + "-of-a-key"
)

// everywhere a text of the user's can stand.
func canaryRequests() []*traced {
	message := []any{map[string]any{"role": "system", "content": canary}, map[string]any{"role": "user", "content": "say " + canary, "name": canary}}
	more := func(m map[string]any) map[string]any {
		for k, v := range map[string]any{"user": canary, "stop": []string{canary}, "logit_bias": []any{[]any{canary, false}}, "metadata": map[string]any{canary: canary},
			"seed": 7, "temperature": 0.9, "model": canary + " as a text", "ignore_eos": true} {
			m[k] = v
		}
		return m
	}
	return []*traced{
		{path: "/v1/chat/completions", stream: true, request: more(map[string]any{"messages": message, "max_tokens": 30})},
		{path: "/v1/chat/completions", request: more(map[string]any{"messages": message, "max_tokens": 30, "n": 2})},
		{path: "/completion", stream: true, request: more(map[string]any{"prompt": canary, "n_predict": 30})},
		{path: "/completion", request: more(map[string]any{"prompt": canary, "n_predict": 30})},
		{path: "/v1/completions", request: more(map[string]any{"prompt": canary, "max_tokens": 30})},
		{path: "/v1/messages", stream: true, request: more(map[string]any{"messages": message[1:], "system": canary, "max_tokens": 30})},
		{path: "/v1/responses", stream: true, request: more(map[string]any{"input": canary, "instructions": canary, "max_output_tokens": 30})},
	}
}

// No prompt, no completion and no key is in anything that telemetry says, with everything turned on.
func TestNothingOfAConversationIsInTelemetry(t *testing.T) {
	got, flags, env := receiver(t, "http/protobuf")
	keys := keyFileOf(t, canaryKey+"\n")
	s := startShielded(t, serveOptions{model: demoModel, env: env, args: []string{"-np", "2"},
		flags: append(flags, "--trace-layers", "1", "--log-level", "debug", "--log-format", "json", "--api-key-file", keys, "--max-body", "64KiB")})
	secret := []string{canary}
	list := canaryRequests()
	for i, q := range list {
		q.key = canaryKey
		if err := q.ask(s, i); err != nil || q.status != http.StatusOK {
			t.Fatalf("%s: %d, %v", q.path, q.status, err)
		}
		secret = append(secret, pieces(q.content)...)
	}
	if len(secret) < len(list) {
		t.Fatalf("too little was said to look for: %q", secret)
	}
	s.mistakes(t)
	if !got.Await(patience, func(spans []collector.Span) bool {
		return !slices.ContainsFunc(list, func(q *traced) bool { return len(spansOf(spans, q.trace)) < 4 })
	}) {
		t.Fatalf("not all spans came; %d did\n%s", len(got.Spans()), s.log)
	}
	for _, q := range list {
		if !strings.Contains(s.log.String(), `"trace_id":"`+q.trace+`"`) {
			t.Errorf("the log has no line about trace %s", q.trace)
		}
	}
	for where, text := range map[string]string{
		"OTLP": string(got.Raw()), "metrics": s.page(t, "/kvshield/metrics", canaryKey), "status": s.page(t, "/kvshield/status", canaryKey),
		"events": s.snapshot(t, canaryKey), "log": s.log.String(),
	} {
		if len(text) < 100 {
			t.Errorf("%s says nothing: %q", where, text)
		}
		for _, word := range secret {
			if strings.Contains(text, word) {
				at := strings.Index(text, word)
				t.Errorf("%s has %q: …%q…", where, word, text[max(0, at-200):min(len(text), at+100)])
			}
		}
	}
}

// pieces of an answer that are long enough to be found by nothing but itself.
func pieces(content string) []string {
	const length = 16
	if text, _ := json.Marshal(content); len(content) >= length && string(text) == `"`+content+`"` {
		return []string{content[:length], content[len(content)-length:]}
	}
	return nil
}

func keyFileOf(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// mistakes are requests that are refused, by kvshield and by the engine, and what they are told has no part of them.
func (s *server) mistakes(t *testing.T) {
	t.Helper()
	for path, body := range map[string]string{
		"/v1/chat/completions": `{"messages":"` + canary + `"}`, "/completion": canary, "/v1/completions": `{"prompt":"` + canary + strings.Repeat(" "+canary, 8<<10) + `"}`,
		"/slots/0?action=save&" + canary: `{"filename":"` + canary + `"}`, "/kvshield/" + canary: canary, "/" + canary: canary,
	} {
		for _, key := range []string{canaryKey, canaryKey + "x"} {
			r, err := http.NewRequest("POST", s.url+path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Authorization", "Bearer "+key)
			r.Header.Set("X-User", canary)
			resp, err := s.client.Do(r)
			if err != nil {
				continue // a body that is too large is not read to its end
			}
			if resp.StatusCode < 400 {
				t.Errorf("%s: %s", path, resp.Status)
			}
			resp.Body.Close()
		}
	}
}

// snapshot is the first event of the page's stream.
func (s *server) snapshot(t *testing.T, key string) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "GET", s.url+"/kvshield/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+key)
	resp, err := s.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if text, found := strings.CutPrefix(lines.Text(), "data: "); found {
			var any map[string]json.RawMessage
			if err := json.Unmarshal([]byte(text), &any); err != nil || any["tokens"] == nil {
				t.Fatalf("%v in %s", err, text)
			}
			return text
		}
	}
	t.Fatal(fmt.Errorf("no event: %w", lines.Err()))
	return ""
}
