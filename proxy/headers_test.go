package proxy_test

import (
	"compress/gzip"
	"io"
	"net/http"
	"testing"
)

func TestHopByHopHeadersStopBeforeTheEngine(t *testing.T) {
	seen := make(chan http.Header, 1)
	s, _ := front(t, httpEngine(t, func(w http.ResponseWriter, r *http.Request) { seen <- r.Header.Clone() }))
	req, _ := http.NewRequest("GET", s.URL, nil)
	for k, v := range map[string]string{
		"Connection": "X-Hop, Upgrade", "X-Hop": "1", "Upgrade": "h2c", "Keep-Alive": "timeout=5",
		"Proxy-Authorization": "Basic x", "Proxy-Connection": "keep-alive", "Te": "gzip",
		"Forwarded": "for=1.2.3.4", "X-Forwarded-For": "1.2.3.4",
		"Authorization": "Bearer key", "X-End": "1",
	} {
		req.Header.Set(k, v)
	}
	r, err := s.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	got := <-seen
	assertAbsent(t, got, "X-Hop", "Upgrade", "Keep-Alive", "Proxy-Authorization", "Proxy-Connection", "Te",
		"Forwarded", "X-Forwarded-For")
	if got.Get("X-End") != "1" || got.Get("Authorization") != "Bearer key" {
		t.Errorf("end-to-end headers were lost: %v", got)
	}
}

func TestHopByHopHeadersStopBeforeTheClient(t *testing.T) {
	s, _ := front(t, rawEngine(t, func(w io.Writer) {
		io.WriteString(w, "HTTP/1.1 200 OK\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n"+
			"Proxy-Authenticate: Basic\r\nX-End: 1\r\nContent-Length: 0\r\n\r\n")
	}))
	r, _, err := get(t, s, "/")
	if err != nil {
		t.Fatal(err)
	}
	assertAbsent(t, r.Header, "X-Hop", "Keep-Alive", "Proxy-Authenticate", "Connection")
	if r.Header.Get("X-End") != "1" {
		t.Errorf("an end-to-end header was lost: %v", r.Header)
	}
}

func assertAbsent(t *testing.T, h http.Header, keys ...string) {
	t.Helper()
	for _, k := range keys {
		if v := h.Values(k); len(v) > 0 {
			t.Errorf("%s got through: %q", k, v)
		}
	}
}

// Compression is between the client and the engine: llama-server's pages insist on it.
func TestCompressionIsNotTheProxysBusiness(t *testing.T) {
	s, _ := front(t, httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Accept-Encoding") != "gzip" {
			io.WriteString(w, r.Header.Get("Accept-Encoding"))
			return
		}
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		io.WriteString(z, "packed")
		z.Close()
	}))
	s.Client().Transport.(*http.Transport).DisableCompression = true
	for _, tc := range []struct{ accept, encoding string }{{"gzip", "gzip"}, {"identity", ""}, {"", ""}} {
		req, _ := http.NewRequest("GET", s.URL, nil)
		if tc.accept != "" {
			req.Header.Set("Accept-Encoding", tc.accept)
		}
		r, err := s.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(r.Body)
		r.Body.Close()
		if got := r.Header.Get("Content-Encoding"); got != tc.encoding {
			t.Errorf("asked for %q, got %q", tc.accept, got)
		}
		if tc.encoding == "" && string(body) != tc.accept {
			t.Errorf("the engine was asked for %q instead of %q", body, tc.accept)
		}
	}
}

func TestPathQueryAndStatusPassThrough(t *testing.T) {
	seen := make(chan string, 1)
	s, _ := front(t, httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
		seen <- r.Method + " " + r.RequestURI + " " + r.Host
		w.WriteHeader(http.StatusTeapot)
	}))
	r, body, err := get(t, s, "/a%2Fb/c?x=1&y=%20")
	if r.StatusCode != http.StatusTeapot || body != "" || err != nil {
		t.Errorf("status %d, body %q, %v", r.StatusCode, body, err)
	}
	if got, want := <-seen, "GET /a%2Fb/c?x=1&y=%20 localhost"; got != want {
		t.Errorf("the engine saw %q, want %q", got, want)
	}
}

// Answers without a body have no length either, and are sound.
func TestAnswersWithoutABody(t *testing.T) {
	s, _ := front(t, rawEngine(t, func(w io.Writer) { io.WriteString(w, "HTTP/1.1 204 No Content\r\n\r\n") }))
	if r, _, err := get(t, s, "/"); r.StatusCode != 204 || err != nil {
		t.Errorf("status %d, %v", r.StatusCode, err)
	}
	s, _ = front(t, rawEngine(t, func(w io.Writer) { io.WriteString(w, "HTTP/1.1 200 OK\r\n\r\n") }))
	r, err := s.Client().Head(s.URL)
	if err != nil || r.StatusCode != 200 {
		t.Fatalf("HEAD: %v, %v", r, err)
	}
	r.Body.Close()
}
