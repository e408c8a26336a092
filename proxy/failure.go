package proxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"syscall"

	"github.com/kvshield/kvshield/proxy/reply"
)

// writeUnavailable answers 503 with what happened and when to try again.
func writeUnavailable(w http.ResponseWriter, st State, what string) {
	reply.Failure{
		Message: fmt.Sprintf("%s; send the request again in %d s", what, reply.RetrySeconds(st.RetryAfter)),
		Type:    reply.Unavailable,
		Code:    http.StatusServiceUnavailable,
	}.WriteRetry(w, st.RetryAfter)
}

// broken is an engine that stopped; when says at which point of the exchange.
func broken(st State, when string) reply.Failure {
	why := ""
	if !st.Ready && st.Reason != "" {
		why = " (" + st.Reason + ")"
	}
	return reply.Failure{
		Message: "the engine stopped " + when + why + "; discard what came of it and send the request again",
		Type:    reply.Server,
		Code:    http.StatusBadGateway,
	}
}

// errTooLong is the cause of a request's context that ran past Config.RequestTimeout.
var errTooLong = errors.New("the request took too long")

var tooLong = reply.Failure{
	Message: "the answer was not finished in the time that this server gives a request; ask for fewer tokens, or have --request-timeout raised",
	Type:    reply.Server,
	Code:    http.StatusGatewayTimeout,
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
