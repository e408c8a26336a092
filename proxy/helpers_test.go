package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kvshield/kvshield/proxy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must happen; nothing depends on its value.
const patience = 20 * time.Second

// listen opens a Unix socket in a folder whose name is short enough for one.
func listen(t *testing.T) net.Listener {
	t.Helper()
	dir, err := os.MkdirTemp("", "proxy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func dialer(l net.Listener) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", l.Addr().String())
	}
}

// httpEngine is a real HTTP server on a Unix socket, in the engine's place.
func httpEngine(t *testing.T, h http.HandlerFunc) net.Listener {
	t.Helper()
	l := listen(t)
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: h}}
	s.Start()
	t.Cleanup(s.Close)
	return l
}

// rawEngine reads a request with its body from each connection, lets answer write whatever it
// likes, and closes the connection.
func rawEngine(t *testing.T, answer func(io.Writer)) net.Listener {
	t.Helper()
	l := listen(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				if r, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
					io.Copy(io.Discard, r.Body)
					answer(c)
				}
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l
}

func ready() proxy.State { return proxy.State{Ready: true} }

// front starts a proxy before the engine on l. Its log is returned for reading afterwards.
func front(t *testing.T, l net.Listener) (*httptest.Server, *syncBuffer) {
	t.Helper()
	return frontWith(t, proxy.Config{Dial: dialer(l), State: ready})
}

func frontWith(t *testing.T, c proxy.Config) (*httptest.Server, *syncBuffer) {
	t.Helper()
	logs := new(syncBuffer)
	c.Log = slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := httptest.NewUnstartedServer(proxy.New(c))
	s.Config.ErrorLog = slog.NewLogLogger(slog.NewTextHandler(logs, nil), slog.LevelError)
	s.Start()
	t.Cleanup(s.Close)
	return s, logs
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// wait fails the test when c is not closed.
func wait(t *testing.T, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("did not happen: %s", what)
	}
}

func get(t *testing.T, s *httptest.Server, path string) (*http.Response, string, error) {
	t.Helper()
	r, err := s.Client().Get(s.URL + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r, string(b), err
}

type failure struct {
	Message string
	Type    string
	Code    int
}

// failureIn reads {"error":{…}} and nothing else.
func failureIn(t *testing.T, body string) failure {
	t.Helper()
	var e struct{ Error failure }
	d := json.NewDecoder(strings.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		t.Fatalf("not an error body: %q: %v", body, err)
	}
	if e.Error.Message == "" {
		t.Fatalf("no message in %q", body)
	}
	return e.Error
}
