package proxy_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvshield/kvshield/proxy"
	"github.com/kvshield/kvshield/proxy/keys"
	"github.com/kvshield/kvshield/proxy/limit"
)

func echo(t *testing.T) net.Listener {
	return httpEngine(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
}

func TestBodiesHaveALimit(t *testing.T) {
	s, _ := frontWith(t, proxy.Config{Dial: dialer(echo(t)), State: ready, MaxBody: 1000})
	for name, body := range map[string]io.Reader{
		"declared": strings.NewReader(strings.Repeat("x", 1001)),
		"chunked":  struct{ io.Reader }{strings.NewReader(strings.Repeat("x", 100_000))},
	} {
		r, err := s.Client().Post(s.URL, "text/plain", body)
		if err != nil {
			t.Fatal(name, err)
		}
		text, _ := io.ReadAll(r.Body)
		r.Body.Close()
		if r.StatusCode != 413 || failureIn(t, string(text)).Code != 413 {
			t.Errorf("%s: %d %s", name, r.StatusCode, text)
		}
	}
	r, err := s.Client().Post(s.URL, "text/plain", strings.NewReader(strings.Repeat("x", 1000)))
	if err != nil || r.StatusCode != 200 {
		t.Fatalf("%v %v", r, err)
	}
	r.Body.Close()
}

func TestUpgradesAreRefused(t *testing.T) {
	s, _ := front(t, echo(t))
	req, _ := http.NewRequest("GET", s.URL, nil)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "WebSocket")
	r, err := s.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, _ := io.ReadAll(r.Body)
	if r.StatusCode != 501 || !strings.Contains(failureIn(t, string(text)).Message, "server-sent events") {
		t.Errorf("%d %s", r.StatusCode, text)
	}
}

func TestRequestsWaitForTheirTurn(t *testing.T) {
	release := make(chan struct{})
	var most, now atomic.Int64
	l := httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if n := now.Add(1); n > most.Load() {
			most.Store(n)
		}
		defer now.Add(-1)
		if r.Method == "POST" {
			<-release
		}
	})
	s, _ := frontWith(t, proxy.Config{Dial: dialer(l), State: ready, Limit: limit.New(2, 3, time.Minute)})
	var wg sync.WaitGroup
	codes := make(chan *http.Response, 8)
	for range 8 {
		wg.Go(func() {
			r, err := s.Client().Post(s.URL, "text/plain", strings.NewReader("x"))
			if err != nil {
				t.Error(err)
				return
			}
			r.Body.Close()
			codes <- r
		})
	}
	for range 3 { // 2 at work, 3 in the queue
		if r := <-codes; r.StatusCode != 429 || r.Header.Get("Retry-After") == "" {
			t.Errorf("%d, Retry-After %q", r.StatusCode, r.Header.Get("Retry-After"))
		}
	}
	if r, _, err := get(t, s, "/health"); err != nil || r.StatusCode != 200 {
		t.Errorf("health had to wait: %v %v", r, err)
	}
	close(release)
	wg.Wait()
	for range 5 {
		if r := <-codes; r.StatusCode != 200 {
			t.Errorf("%d", r.StatusCode)
		}
	}
	if most.Load() > 3 { // two, and the health request
		t.Errorf("%d requests at a time", most.Load())
	}
}

func TestLateRequestsAreTurnedAway(t *testing.T) {
	release := make(chan struct{})
	arrived := make(chan struct{}, 1)
	l := httpEngine(t, func(w http.ResponseWriter, r *http.Request) { arrived <- struct{}{}; <-release })
	s, _ := frontWith(t, proxy.Config{Dial: dialer(l), State: ready, Limit: limit.New(1, 3, 20*time.Millisecond)})
	first := make(chan struct{})
	go func() {
		defer close(first)
		if r, err := s.Client().Post(s.URL, "text/plain", nil); err == nil {
			r.Body.Close()
		}
	}()
	<-arrived
	r, err := s.Client().Post(s.URL, "text/plain", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != 503 || r.Header.Get("Retry-After") == "" {
		t.Errorf("%d", r.StatusCode)
	}
	close(release)
	<-first
}

func TestRequestsHaveATimeLimit(t *testing.T) {
	l := httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stream" {
			w.Header().Set("Content-Type", "text/event-stream")
			io.WriteString(w, "data: 1\n\n")
			http.NewResponseController(w).Flush()
		}
		<-r.Context().Done()
	})
	s, _ := frontWith(t, proxy.Config{Dial: dialer(l), State: ready, RequestTimeout: 30 * time.Millisecond})
	r, body, err := get(t, s, "/")
	if err != nil || r.StatusCode != 504 || !strings.Contains(failureIn(t, body).Message, "--request-timeout") {
		t.Errorf("%v %v %s", r, err, body)
	}
	_, body, err = get(t, s, "/stream")
	if err != nil || !strings.HasPrefix(body, "data: 1\n\n") || !strings.Contains(body, "--request-timeout") {
		t.Errorf("%v %q", err, body)
	}
}

// A connection that fails while nothing was sent is tried again, but not to an engine that is known to be away.
func TestDiallingIsTriedAgain(t *testing.T) {
	l := echo(t)
	var tries atomic.Int64
	away := false
	s, _ := frontWith(t, proxy.Config{DialPatience: time.Minute, State: func() proxy.State { return proxy.State{Ready: !away || tries.Load() == 0} },
		Dial: func(ctx context.Context) (net.Conn, error) {
			if tries.Add(1) < 3 {
				return nil, errors.New("no")
			}
			return dialer(l)(ctx)
		}})
	if r, _, err := get(t, s, "/"); err != nil || r.StatusCode != 200 || tries.Load() != 3 {
		t.Errorf("%v %v after %d tries", r, err, tries.Load())
	}
	away = true
	tries.Store(0)
	if r, _, err := get(t, s, "/"); err != nil || r.StatusCode != 503 || tries.Load() != 1 {
		t.Errorf("%v %v after %d tries", r, err, tries.Load())
	}
}

// own answers every path of a page of our own.
func own(h http.HandlerFunc, paths ...string) map[string]http.Handler {
	m := map[string]http.Handler{}
	for _, path := range paths {
		m[path] = h
	}
	return m
}

func TestOwnPageIsOpenAndItsEventsAreNot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	os.WriteFile(path, []byte("a:sk-secret-1\n"), 0o600)
	ring, _, err := keys.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	ours := func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusAccepted) }
	s, _ := frontWith(t, proxy.Config{Dial: dialer(echo(t)), State: ready, Keys: ring,
		Own: own(ours, "/kvshield", "/kvshield/", "/kvshield/assets/page.js", "/kvshield/events", "/kvshield/metrics")})
	for target, want := range map[string]int{
		"GET /kvshield": 202, "HEAD /kvshield/": 202, "GET /kvshield/": 202, "GET /kvshield/assets/page.js": 202,
		"GET /kvshield/events": 401, "GET /kvshield/metrics": 401, "POST /kvshield/": 401, "GET /kvshield/assets/": 401, "GET /kvshield/assets/../events": 401,
		"GET /kvshield/assets/none.js": 401, "GET /kvshield/status": 401, "GET //kvshield/": 401,
	} {
		method, uri, _ := strings.Cut(target, " ")
		req, _ := http.NewRequest(method, s.URL+uri, nil)
		r, err := s.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		if r.StatusCode != want {
			t.Errorf("%s: %d, want %d", target, r.StatusCode, want)
		}
	}
}

func TestKeysAreAskedForAndNotPassedOn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	os.WriteFile(path, []byte("a:sk-secret-1\n"), 0o600)
	ring, _, err := keys.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan http.Header, 10)
	l := httpEngine(t, func(w http.ResponseWriter, r *http.Request) { seen <- r.Header.Clone() })
	s, _ := frontWith(t, proxy.Config{Dial: dialer(l), State: ready, Keys: ring, Status: func() any { return 1 }})
	for target, want := range map[string]int{
		"GET /": 200, "GET /health": 200, "GET /index.html": 200, "GET /slots": 401, "GET /kvshield/status": 401, "GET /kvshield/x.js": 401, "POST /health": 401,
		"GET /%68ealth": 401, "GET //health": 401, "GET /slots/..;/health": 401, "POST /index.html": 401, "OPTIONS /v1/completions": 401,
	} {
		method, uri, _ := strings.Cut(target, " ")
		req, _ := http.NewRequest(method, s.URL+uri, nil)
		r, err := s.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		if r.StatusCode != want {
			t.Errorf("%s: %d, want %d", target, r.StatusCode, want)
		}
		if r.StatusCode == 200 {
			<-seen
		}
	}
	req, _ := http.NewRequest("GET", s.URL+"/slots", nil)
	req.Header.Set("Authorization", "Bearer sk-secret-1")
	r, err := s.Client().Do(req)
	if err != nil || r.StatusCode != 200 {
		t.Fatal(r, err)
	}
	r.Body.Close()
	assertAbsent(t, <-seen, "Authorization", "X-Api-Key")
}

type recorder struct {
	mu     sync.Mutex
	events []string
}

func (r *recorder) Observe(_ context.Context, e proxy.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	text := []string{"accepted", "queued", "slot", "sent", "first", "chunk", "end"}[e.Kind]
	if e.Kind == proxy.Chunk {
		text += " " + string(e.Data)
	}
	if e.Kind == proxy.End {
		text += fmt.Sprintf(" %d %s", e.Status, e.Refusal)
	}
	r.events = append(r.events, text)
}

func TestRequestsAreObserved(t *testing.T) {
	next := make(chan struct{})
	l := httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
		for _, part := range []string{"a", "b"} {
			io.WriteString(w, part)
			http.NewResponseController(w).Flush()
			<-next
		}
	})
	rec := &recorder{}
	s, _ := frontWith(t, proxy.Config{Dial: dialer(l), State: ready, Observer: rec})
	r, err := s.Client().Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		r.Body.Read(make([]byte, 1))
		next <- struct{}{}
	}
	io.ReadAll(r.Body)
	r.Body.Close()
	r, _ = s.Client().Post(s.URL+"/props", "application/json", nil)
	r.Body.Close()
	s.Close()
	want := []string{"accepted", "sent", "first", "chunk a", "chunk b", "end 200 ", "accepted", "first"}
	if !slices.Equal(rec.events[:len(want)], want) || rec.events[len(rec.events)-1] != "end 403 permission_error" {
		t.Errorf("%q", rec.events)
	}
}

func TestStatusIsAnswered(t *testing.T) {
	s, _ := frontWith(t, proxy.Config{Dial: dialer(echo(t)), State: func() proxy.State { return proxy.State{} }, Status: func() any { return map[string]int{"a": 1} }})
	r, body, err := get(t, s, "/kvshield/status")
	var got map[string]int
	if err != nil || r.StatusCode != 200 || json.Unmarshal([]byte(body), &got) != nil || got["a"] != 1 {
		t.Errorf("%v %v %s", r, err, body)
	}
	if r, _, _ := get(t, s, "/kvshield/other"); r.StatusCode != 404 {
		t.Errorf("%d", r.StatusCode)
	}
}
