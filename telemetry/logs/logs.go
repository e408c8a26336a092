// Package logs makes loggers whose lines name the trace that they belong to.
//
// Start with [New]. A line that is written with a request's context (slog's …Context functions) has its trace_id and span_id. What is
// a warning or worse is also told to whoever keeps the last errors.
package logs

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"time"

	"go.opentelemetry.io/otel/trace"
)

// Formats of a log.
const (
	Text = "text"
	JSON = "json"
)

// New logger of lines in a format. Failed, where not nil, is told of warnings and errors, whatever the level is.
func New(w io.Writer, format string, level slog.Leveler, failed func(at time.Time, message string)) (*slog.Logger, error) {
	o := &slog.HandlerOptions{Level: level}
	var h slog.Handler
	switch format {
	case Text:
		h = slog.NewTextHandler(w, o)
	case JSON:
		h = slog.NewJSONHandler(w, o)
	default:
		return nil, fmt.Errorf("there is no log format %q; use %s or %s", format, Text, JSON)
	}
	return slog.New(handler{h, failed}), nil
}

type handler struct {
	slog.Handler
	failed func(time.Time, string)
}

func (h handler) Enabled(ctx context.Context, l slog.Level) bool {
	return h.Handler.Enabled(ctx, l) || h.failed != nil && l >= slog.LevelWarn
}

func (h handler) Handle(ctx context.Context, r slog.Record) error {
	if h.failed != nil && r.Level >= slog.LevelWarn {
		h.failed(r.Time, message(r))
	}
	if !h.Handler.Enabled(ctx, r.Level) {
		return nil
	}
	if at := trace.SpanContextFromContext(ctx); at.IsValid() {
		r = r.Clone()
		r.AddAttrs(slog.String("trace_id", at.TraceID().String()), slog.String("span_id", at.SpanID().String()))
	}
	return h.Handler.Handle(ctx, r)
}

func (h handler) WithAttrs(a []slog.Attr) slog.Handler {
	return handler{h.Handler.WithAttrs(a), h.failed}
}
func (h handler) WithGroup(name string) slog.Handler {
	return handler{h.Handler.WithGroup(name), h.failed}
}

// message is a line in words: what happened, and why where that is said.
func message(r slog.Record) string {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "error", "cause", "reason", "how":
			if v := a.Value.String(); v != "" && v != "<nil>" {
				text += ": " + v
			}
		}
		return true
	})
	return text
}
