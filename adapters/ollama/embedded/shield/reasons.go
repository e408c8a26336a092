package shield

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// reasons tells Ollama's clients why a runner is gone. Ollama asks a runner over HTTP, and says of one that has ended no more than
// that it "unexpectedly stopped". So requests that fail because a hook ended the runner are answered here with the reason. It stands in
// for the transport of http.DefaultClient, which Ollama uses.
type reasons struct {
	next http.RoundTripper

	mu    sync.Mutex
	ports map[int]string    // by the runner's process
	said  map[string]string // by the runner's port
}

func newReasons() *reasons {
	return &reasons{next: http.DefaultTransport, ports: map[int]string{}, said: map[string]string{}}
}

// ended is called when a hook ends its process, which may be gone by now.
func (r *reasons) ended(pid int, why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if port, ok := r.ports[pid]; ok {
		r.said[port] = why
	}
}

// answered notes which process a port belongs to, while it is there. Whatever another one that had the port said is over.
func (r *reasons) answered(port string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, over := r.said[port]; !over && r.process(port) != 0 {
		return
	}
	delete(r.said, port)
	delete(r.ports, r.process(port))
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		text, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(text), "\x00--port\x00"+port+"\x00") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			r.ports[pid] = port
		}
	}
}

// process that has a port, or 0. The caller holds the lock.
func (r *reasons) process(port string) int {
	for pid, p := range r.ports {
		if p == port {
			return pid
		}
	}
	return 0
}

func (r *reasons) of(port string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.said[port]
}

const reasonWithin = time.Second

// await waits a moment for the reason of an end that has just been noticed; empty when there is none.
func (r *reasons) await(port string) string {
	for end := time.Now().Add(reasonWithin); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if why := r.of(port); why != "" {
			return why
		}
	}
	return ""
}

// RoundTrip implements http.RoundTripper.
func (r *reasons) RoundTrip(req *http.Request) (*http.Response, error) {
	port := req.URL.Port()
	resp, err := r.next.RoundTrip(req)
	switch {
	case req.URL.Hostname() != "127.0.0.1":
		return resp, err
	case err == nil:
		r.answered(port)
		resp.Body = &body{ReadCloser: resp.Body, reasons: r, port: port}
		return resp, nil
	case req.Context().Err() != nil || req.Method != http.MethodPost:
		return nil, err
	}
	why := r.await(port)
	if why == "" {
		return nil, err
	}
	return &http.Response{
		StatusCode: http.StatusInternalServerError, Status: "500 Internal Server Error", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{}, Body: io.NopCloser(strings.NewReader(why)), ContentLength: int64(len(why)), Request: req,
	}, nil
}

// body is an answer that may end before its end.
type body struct {
	io.ReadCloser
	reasons *reasons
	port    string
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		if why := b.reasons.await(b.port); why != "" {
			err = fmt.Errorf("%w: %s", err, why)
		}
	}
	return n, err
}
