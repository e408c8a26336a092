// Package reply writes errors as llama-server and the OpenAI API write them.
package reply

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

// Types of errors.
const (
	Unavailable    = "unavailable_error"
	Server         = "server_error"
	BadRequest     = "invalid_request_error"
	Permission     = "permission_error"
	Authentication = "authentication_error"
	RateLimit      = "rate_limit_error"
)

// Failure is one error: {"error":{"message":…,"type":…,"code":…}}. Its code is the HTTP status.
type Failure struct {
	Message string `json:"message"`
	Type    string `json:"type"`
	Code    int    `json:"code"`
}

func (f Failure) Error() string { return f.Message }

// JSON is the failure as an object.
func (f Failure) JSON() []byte { return marshal(map[string]Failure{"error": f}) }

// Line is the failure as Ollama writes it: {"error":"…"}.
func (f Failure) Line() []byte { return marshal(map[string]string{"error": f.Message}) }

func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings and a number always marshal
	}
	return b
}

// Write answers with the failure. A writer, or one that it wraps, may be told of it (Refused), or ask for Ollama's form (Plain).
func (f Failure) Write(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	text := f.JSON()
	for at := w; at != nil; at = wrapped(at) {
		switch told := at.(type) {
		case interface{ Refused(string) }:
			told.Refused(f.Type)
		case interface{ Plain() }:
			text = f.Line()
		}
	}
	w.WriteHeader(f.Code)
	w.Write(text)
}

func wrapped(w http.ResponseWriter) http.ResponseWriter {
	if u, ok := w.(interface{ Unwrap() http.ResponseWriter }); ok {
		return u.Unwrap()
	}
	return nil
}

// WriteRetry answers with the failure and when to try again, in whole seconds, rounded up: a client that comes back
// early is turned away again.
func (f Failure) WriteRetry(w http.ResponseWriter, after time.Duration) {
	w.Header().Set("Retry-After", strconv.Itoa(RetrySeconds(after)))
	f.Write(w)
}

// RetrySeconds is at least 1.
func RetrySeconds(d time.Duration) int {
	return max(1, int((d+time.Second-1)/time.Second))
}
