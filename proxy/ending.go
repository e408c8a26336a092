package proxy

import (
	"context"
	"io"
	"mime"
	"net/http"
	"strings"

	"github.com/kvshield/kvshield/proxy/reply"
)

// watch puts an answer between the engine and the client that notices how the body ends.
func (e *engine) watch(r *http.Response) error {
	if r.Body == http.NoBody || r.StatusCode == http.StatusSwitchingProtocols {
		return nil
	}
	if r.ContentLength < 0 && len(r.TransferEncoding) == 0 {
		return errUnframed
	}
	r.Body = &answer{
		ReadCloser: r.Body,
		ctx:        r.Request.Context(),
		ending:     endingFor(r),
		engine:     e,
		last:       '\n',
	}
	return nil
}

// answer is the body of one answer. When the engine breaks off, it goes on with an ending in the
// body's own format where there is one, and fails where there is none.
type answer struct {
	io.ReadCloser
	ctx    context.Context
	ending ending
	engine *engine

	last byte   // the last byte read; at the start, a line's end
	tail []byte // what is left of the ending
	cut  bool
}

func (a *answer) Read(p []byte) (int, error) {
	if a.cut {
		return a.readTail(p)
	}
	n, err := a.ReadCloser.Read(p)
	if n > 0 {
		a.last = p[n-1]
	}
	if err == nil || err == io.EOF {
		return n, err
	}
	late := context.Cause(a.ctx) == errTooLong
	if a.ctx.Err() != nil && !late {
		return n, err
	}
	if !late {
		a.engine.log.WarnContext(a.ctx, "the engine stopped in the middle of an answer", "cause", cause(err))
	}
	if a.ending == nil {
		return n, err
	}
	why := tooLong
	if !late {
		why = broken(a.engine.state(), "in the middle of this answer")
	}
	a.cut = true
	cut(a.ctx)
	a.tail = a.ending(a.last, why)
	return n, nil
}

func (a *answer) readTail(p []byte) (int, error) {
	n := copy(p, a.tail)
	a.tail = a.tail[n:]
	if len(a.tail) == 0 {
		return n, io.EOF
	}
	return n, nil
}

// ending writes how a body ends that was cut after the byte last.
type ending func(last byte, f reply.Failure) []byte

// endingFor chooses by the body's type. A body with a declared length or an encoding of its own
// has no room for anything more.
func endingFor(r *http.Response) ending {
	if r.ContentLength >= 0 || !identity(r.Header) {
		return nil
	}
	t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return nil
	}
	switch t {
	case "text/event-stream":
		return endEvents
	case "application/x-ndjson":
		return endLines
	default:
		return nil
	}
}

func identity(h http.Header) bool {
	enc := strings.TrimSpace(strings.Join(h.Values("Content-Encoding"), ","))
	return enc == "" || strings.EqualFold(enc, "identity")
}

// endEvents closes whatever event is open, so that the error is an event of its own. A blank line
// too many means nothing in an event stream.
func endEvents(last byte, f reply.Failure) []byte {
	out := endLine(last)
	out = append(out, "\ndata: "...)
	out = append(out, f.JSON()...)
	return append(out, "\n\n"...)
}

// endLines writes the error as Ollama does: a string, not an object.
func endLines(last byte, f reply.Failure) []byte {
	return append(append(endLine(last), f.Line()...), '\n')
}

func endLine(last byte) []byte {
	if last == '\n' {
		return nil
	}
	return []byte{'\n'}
}
