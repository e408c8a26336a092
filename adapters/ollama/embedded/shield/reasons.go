package shield

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ollama/ollama/llm"
)

// reasons tells Ollama's clients why a runner is gone. Ollama asks a runner over HTTP; of one that ended it says that it "unexpectedly
// stopped", and for one that never listened it waits. So requests that fail because a model was refused, or because a hook ended the
// runner, are answered here with the reason. It stands in for the transport of http.DefaultClient, which Ollama uses.
type reasons struct {
	next http.RoundTripper

	mu   sync.Mutex
	said map[string]reason // by the runner's port
}

type reason struct {
	text    string
	refused bool // the runner never listened
}

func (r *reasons) refused(pid int, text string) { r.note(pid, reason{text, true}) }

func (r *reasons) ended(pid int, text string) { r.note(pid, reason{text, false}) }

// note is called while the process is still there.
func (r *reasons) note(pid int, why reason) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return
	}
	args := strings.Split(string(text), "\x00")
	i := slices.Index(args, "--port")
	if i < 0 || i+1 == len(args) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.said[args[i+1]] = why
}

func (r *reasons) of(port string) (reason, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	why, ok := r.said[port]
	return why, ok
}

func (r *reasons) forget(port string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.said, port)
}

const reasonWithin = time.Second

// await waits a moment for the reason of an end that has just been noticed.
func (r *reasons) await(port string) (reason, bool) {
	for end := time.Now().Add(reasonWithin); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if why, ok := r.of(port); ok {
			return why, true
		}
	}
	return reason{}, false
}

// RoundTrip implements http.RoundTripper.
func (r *reasons) RoundTrip(req *http.Request) (*http.Response, error) {
	port := req.URL.Port()
	resp, err := r.next.RoundTrip(req)
	switch {
	case req.URL.Hostname() != "127.0.0.1":
		return resp, err
	case err == nil:
		r.forget(port) // another runner has this port now
		resp.Body = &body{ReadCloser: resp.Body, reasons: r, port: port}
		return resp, nil
	case req.Context().Err() != nil:
		return nil, err
	case req.Method == http.MethodPost:
		if why, ok := r.await(port); ok {
			return answer(req, http.StatusInternalServerError, []byte(why.text)), nil
		}
	default:
		// Ollama waits until a runner is launched before it has it load the model: only then it takes an error.
		if why, ok := r.of(port); ok && why.refused {
			launched, err := json.Marshal(llm.ServerStatusResponse{Status: llm.ServerStatusLaunched})
			return answer(req, http.StatusOK, launched), err
		}
	}
	return nil, err
}

func answer(req *http.Request, code int, body []byte) *http.Response {
	return &http.Response{
		StatusCode: code, Status: http.StatusText(code), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body)), Request: req,
	}
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
		if why, ok := b.reasons.await(b.port); ok {
			err = fmt.Errorf("%w: %s", err, why.text)
		}
	}
	return n, err
}
