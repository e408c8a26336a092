package proxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"
)

// failure is an error as llama-server and the OpenAI API write it.
type failure struct {
	Message string `json:"message"`
	Type    string `json:"type"`
	Code    int    `json:"code"`
}

const (
	unavailable = "unavailable_error"
	serverError = "server_error"
	badRequest  = "invalid_request_error"
)

// json is the failure as an object: {"error":{"message":…}}.
func (f failure) json() []byte { return marshal(map[string]failure{"error": f}) }

// line is the failure as Ollama writes it: {"error":"…"}.
func (f failure) line() []byte { return marshal(map[string]string{"error": f.Message}) }

func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings and a number always marshal
	}
	return b
}

func (f failure) write(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(f.Code)
	w.Write(f.json())
}

// writeUnavailable answers 503 with what happened and when to try again.
func writeUnavailable(w http.ResponseWriter, st State, what string) {
	s := retrySeconds(st.RetryAfter)
	w.Header().Set("Retry-After", strconv.Itoa(s))
	failure{
		Message: fmt.Sprintf("%s; send the request again in %d s", what, s),
		Type:    unavailable,
		Code:    http.StatusServiceUnavailable,
	}.write(w)
}

// retrySeconds rounds up: a client that comes back early is turned away again.
func retrySeconds(d time.Duration) int {
	return max(1, int((d+time.Second-1)/time.Second))
}

// broken is an engine that stopped; when says at which point of the exchange.
func broken(st State, when string) failure {
	why := ""
	if !st.Ready && st.Reason != "" {
		why = " (" + st.Reason + ")"
	}
	return failure{
		Message: "the engine stopped " + when + why + "; discard what came of it and send the request again",
		Type:    serverError,
		Code:    http.StatusBadGateway,
	}
}

// cause names a transport failure for the log in fixed words. The text of the error itself may
// quote what the engine sent, which is part of an answer.
func cause(err error) string {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "connection closed"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "connection reset"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "timed out"
	case errors.Is(err, errUnframed):
		return errUnframed.Error()
	default:
		return "connection lost, or not a sound HTTP/1.1 answer"
	}
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
