package export

import (
	"fmt"
	"log/slog"
	"testing"
)

func describe(r *receiver) string {
	if r == nil {
		return "nowhere"
	}
	return fmt.Sprint(r.protocol, " ", r.url)
}

func TestDestination(t *testing.T) {
	const endpoint, traces, metrics = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER"
	for name, test := range map[string]struct {
		given           string
		env             map[string]string
		traces, metrics string
	}{
		"nothing is configured":   {"", nil, "nowhere", "nowhere"},
		"an endpoint":             {"http://h:4318", nil, "http/protobuf http://h:4318", "http/protobuf http://h:4318"},
		"an endpoint of gRPC":     {"https://h:4317", nil, "grpc https://h:4317", "grpc https://h:4317"},
		"a protocol":              {"http://h:4317", map[string]string{"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http/protobuf http://h:4317", "http/protobuf http://h:4317"},
		"by variable":             {"", map[string]string{endpoint: "http://h:4318"}, "http/protobuf ", "http/protobuf "},
		"one signal":              {"", map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://h:4318", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, "grpc ", "nowhere"},
		"exporter without a port": {"", map[string]string{traces: "otlp"}, "http/protobuf ", "nowhere"},
		"one is off":              {"http://h:4318", map[string]string{metrics: "none"}, "http/protobuf http://h:4318", "nowhere"},
		"all is off":              {"http://h:4318", map[string]string{"OTEL_SDK_DISABLED": "true"}, "nowhere", "nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			to, err := destination(test.given, func(name string) string { return test.env[name] })
			if err != nil || describe(to.traces) != test.traces || describe(to.metrics) != test.metrics {
				t.Errorf("traces %s, metrics %s, %v", describe(to.traces), describe(to.metrics), err)
			}
		})
	}
}

func TestUnusableDestinations(t *testing.T) {
	for name, test := range map[string]struct {
		given string
		env   map[string]string
	}{
		"no address":          {"h:4318", nil},
		"another scheme":      {"ftp://h", nil},
		"an unknown exporter": {"", map[string]string{"OTEL_TRACES_EXPORTER": "zipkin"}},
		"an unknown protocol": {"http://h:4318", map[string]string{"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Start(t.Context(), Config{Endpoint: test.given, Log: slog.New(slog.DiscardHandler), Getenv: func(name string) string { return test.env[name] }})
			if err == nil {
				t.Error("it was taken")
			}
		})
	}
}
