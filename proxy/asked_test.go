package proxy_test

import (
	"context"
	"io"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/kvshield/kvshield/proxy"
)

// told keeps the events of a proxy.
type told struct {
	mu     sync.Mutex
	events []proxy.Event
}

func (t *told) Observe(_ context.Context, e proxy.Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events = append(t.events, e)
}

func (t *told) of(k proxy.Kind) []proxy.Event {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []proxy.Event
	for _, e := range t.events {
		if e.Kind == k {
			list = append(list, e)
		}
	}
	return list
}

// What a request asks for is told; what it says is not, and the engine gets it as it was.
func TestWhatIsAskedFor(t *testing.T) {
	long := strings.Repeat(canary+" ", 1<<14)
	for name, test := range map[string]struct {
		body string
		want map[string]any
	}{
		"OpenAI":     {`{"model":"org/demo-1:q8","messages":[{"role":"user","content":"` + canary + `","seed":1}],"max_tokens":7,"temperature":0.5,"stream":true,"n":2}`, map[string]any{"model": "org/demo-1:q8", "max_tokens": int64(7), "temperature": 0.5, "stream": true, "choices": int64(2)}},
		"Ollama":     {`{"model":"demo","prompt":"` + canary + `","options":{"num_predict":3,"top_k":4,"seed":5}}`, map[string]any{"model": "demo", "max_tokens": int64(3), "top_k": int64(4), "seed": int64(5)}},
		"llama.cpp":  {`{"prompt":"` + long + `","n_predict":-1}`, map[string]any{"max_tokens": int64(-1)}},
		"texts":      {`{"model":"` + canary + ` is a text","seed":"` + canary + `","stream":"` + canary + `"}`, map[string]any{}},
		"repeated":   {`{"seed":1,"seed":2}`, map[string]any{"seed": int64(2)}},
		"no JSON":    {canary, map[string]any{}},
		"many times": {`{` + strings.Repeat(`"seed":1,`, 1000) + `"seed":1}`, map[string]any{"seed": int64(1)}},
	} {
		t.Run(name, func(t *testing.T) {
			got := make(chan string, 1)
			l := httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
				b, _ := io.ReadAll(r.Body)
				got <- string(b)
			})
			rec := new(told)
			s, _ := frontWith(t, proxy.Config{Dial: dialer(l), State: ready, Observer: rec, MaxBody: 1 << 20})
			r, err := s.Client().Post(s.URL+"/completion", "application/json", strings.NewReader(test.body))
			if err != nil {
				t.Fatal(err)
			}
			r.Body.Close()
			if b := <-got; b != test.body {
				t.Errorf("the engine got %d bytes, not the %d that were sent", len(b), len(test.body))
			}
			s.Close()
			params := map[string]any{}
			for _, e := range rec.of(proxy.Asked) {
				for _, p := range e.Parameters {
					params[p.Name] = p.Value
				}
			}
			if !maps.Equal(params, test.want) {
				t.Errorf("told of %v, want %v", params, test.want)
			}
		})
	}
}

func TestAnswersThatBreakOffAreToldOf(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: "
	for name, test := range map[string]struct {
		answer string
		cut    bool
	}{
		"whole":         {ok + "text/event-stream\r\n\r\n3\r\nx\n\n\r\n0\r\n\r\n", false},
		"in a stream":   {ok + "text/event-stream\r\n\r\n3\r\nx\n\n\r\n", true},
		"in other text": {ok + "text/plain\r\n\r\n3\r\nx\n\n\r\n", true},
		"at once":       {"", false}, // a whole answer, with an error
	} {
		t.Run(name, func(t *testing.T) {
			rec := new(told)
			s, _ := frontWith(t, proxy.Config{Dial: dialer(rawEngine(t, func(w io.Writer) { io.WriteString(w, test.answer) })), State: ready, Observer: rec})
			if r, err := s.Client().Get(s.URL + "/"); err == nil {
				io.Copy(io.Discard, r.Body)
				r.Body.Close()
			}
			s.Close()
			if ends := rec.of(proxy.End); len(ends) != 1 || ends[0].Cut != test.cut {
				t.Errorf("%+v", ends)
			}
		})
	}
}
