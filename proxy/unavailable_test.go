package proxy_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/proxy"
)

func TestNotReadyIs503(t *testing.T) {
	for _, tc := range []struct {
		state proxy.State
		retry string
		says  string
	}{
		{proxy.State{Reason: "the enclave is restarting", RetryAfter: 2 * time.Second}, "2", "the enclave is restarting; send the request again in 2 s"},
		{proxy.State{Reason: "the model is loading", RetryAfter: 1500 * time.Millisecond}, "2", "the model is loading; send"},
		{proxy.State{}, "1", "the engine is not ready; send the request again in 1 s"},
	} {
		s, _ := frontWith(t, proxy.Config{
			State: func() proxy.State { return tc.state },
			Dial: func(context.Context) (net.Conn, error) {
				t.Error("dialled an engine that is not ready")
				return nil, errors.New("no")
			},
		})
		r, err := s.Client().Post(s.URL, "application/json", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(r.Body)
		r.Body.Close()
		assert503(t, r, string(body), tc.retry, tc.says)
	}
}

func assert503(t *testing.T, r *http.Response, body, retry, says string) {
	t.Helper()
	f := failureIn(t, body)
	if r.StatusCode != 503 || f.Code != 503 || f.Type != "unavailable_error" {
		t.Errorf("status %d, error %+v", r.StatusCode, f)
	}
	if got := r.Header.Get("Retry-After"); got != retry {
		t.Errorf("Retry-After %q, want %q", got, retry)
	}
	if got := r.Header.Get("Content-Type"); !strings.HasPrefix(got, "application/json") {
		t.Errorf("Content-Type %q", got)
	}
	if !strings.Contains(f.Message, says) {
		t.Errorf("message %q, want %q in it", f.Message, says)
	}
}

func TestEngineDownIs503(t *testing.T) {
	l := listen(t)
	l.Close()
	s, logs := front(t, l)
	r, body, err := get(t, s, "/v1/models")
	if err != nil {
		t.Fatal(err)
	}
	assert503(t, r, body, "1", "the engine cannot be reached; send")
	if !strings.Contains(logs.String(), "the engine cannot be reached") {
		t.Errorf("not logged: %s", logs)
	}
}

func TestEngineThatStopsBeforeItsHeaderIs502(t *testing.T) {
	for name, sent := range map[string]string{
		"nothing":         "",
		"half a header":   "HTTP/1.1 200 OK\r\nContent-Ty",
		"not HTTP":        "hello\r\n\r\n",
		"an upgrade":      "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
		"no known ending": "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n",
	} {
		t.Run(name, func(t *testing.T) {
			s, logs := front(t, rawEngine(t, func(w io.Writer) { io.WriteString(w, sent) }))
			r, body, err := get(t, s, "/")
			if err != nil {
				t.Fatal(err)
			}
			if f := failureIn(t, body); r.StatusCode != 502 || f.Code != 502 || f.Type != "server_error" {
				t.Errorf("status %d, error %+v", r.StatusCode, f)
			}
			if !strings.Contains(logs.String(), "level=WARN") {
				t.Errorf("not logged: %s", logs)
			}
		})
	}
}

// The client that breaks off its upload is not the engine's failure.
func TestBrokenUploadIsNotTheEnginesFault(t *testing.T) {
	s, logs := front(t, httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
	}))
	c, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nnot a length\r\n")
	reply, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(reply), "HTTP/1.1 400 ") {
		t.Errorf("reply %q, %v; want status 400", reply, err)
	}
	if logs.String() != "" {
		t.Errorf("logged: %s", logs)
	}
}

// The engine that dies under an upload is not the client's failure.
func TestEngineThatStopsDuringTheUploadIs502(t *testing.T) {
	l := listen(t)
	body, send := io.Pipe()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		io.ReadFull(c, make([]byte, 1<<10))
		c.Close()
		send.Close()
	}()
	go send.Write(make([]byte, 1<<20))
	s, _ := front(t, l)
	r, err := s.Client().Post(s.URL, "application/octet-stream", body)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusBadGateway {
		t.Errorf("status %d, want 502", r.StatusCode)
	}
}

// The proxy must not send a request twice: the first may have been acted on.
func TestNothingIsSentTwice(t *testing.T) {
	requests := make(chan struct{}, 10)
	s, _ := front(t, rawEngine(t, func(io.Writer) { requests <- struct{}{} }))
	for range 3 {
		get(t, s, "/")
	}
	if len(requests) != 3 {
		t.Errorf("3 requests arrived as %d", len(requests))
	}
}
