package logs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace"
)

var (
	traceID = trace.TraceID{1, 2, 3}
	spanID  = trace.SpanID{4, 5}
)

func inTrace(ctx context.Context) context.Context {
	return trace.ContextWithSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{TraceID: traceID, SpanID: spanID}))
}

func TestLinesNameTheirTrace(t *testing.T) {
	var out bytes.Buffer
	log, err := New(&out, JSON, slog.LevelInfo, nil)
	if err != nil {
		t.Fatal(err)
	}
	log.With("a", 1).WarnContext(inTrace(t.Context()), "within")
	log.WarnContext(t.Context(), "without")
	d := json.NewDecoder(&out)
	var in, not struct {
		Msg   string
		A     int
		Trace string `json:"trace_id"`
		Span  string `json:"span_id"`
	}
	if err := errors.Join(d.Decode(&in), d.Decode(&not)); err != nil {
		t.Fatal(err)
	}
	if in.Trace != traceID.String() || in.Span != spanID.String() || in.A != 1 {
		t.Errorf("%+v", in)
	}
	if not.Trace != "" || not.Msg != "without" {
		t.Errorf("%+v", not)
	}
}

func TestWhatFailedIsTold(t *testing.T) {
	var out bytes.Buffer
	var told []string
	log, err := New(&out, Text, slog.LevelError, func(_ time.Time, m string) { told = append(told, m) })
	if err != nil {
		t.Fatal(err)
	}
	log.Info("goes on")
	log.Warn("the engine cannot be reached", "cause", errors.New("it is gone"), "pid", 3)
	log.Error("the engine ended", "how", nil)
	if len(told) != 2 || told[0] != "the engine cannot be reached: it is gone" || told[1] != "the engine ended" {
		t.Errorf("%q", told)
	}
	if strings.Contains(out.String(), "reached") || !strings.Contains(out.String(), "the engine ended") {
		t.Error(out.String())
	}
}

func TestUnknownFormat(t *testing.T) {
	if _, err := New(nil, "xml", slog.LevelInfo, nil); err == nil {
		t.Error("xml was taken")
	}
}
