package export

import (
	"context"
	"fmt"
	"net/url"
	"strings"

	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

const (
	protocolGRPC = "grpc"
	protocolHTTP = "http/protobuf"
	portGRPC     = "4317"
)

// destinations of the two signals; nil for one that is not sent.
type destinations struct{ traces, metrics *receiver }

// receiver of one signal.
type receiver struct {
	url      string // empty: what the variables say
	protocol string
}

// destination goes by the standard variables, and by an endpoint that wins over theirs.
func destination(endpoint string, getenv func(string) string) (destinations, error) {
	var to destinations
	if strings.EqualFold(getenv("OTEL_SDK_DISABLED"), "true") {
		return to, nil
	}
	for signal, r := range map[string]**receiver{"TRACES": &to.traces, "METRICS": &to.metrics} {
		var err error
		if *r, err = destinationOf(signal, endpoint, getenv); err != nil {
			return to, err
		}
	}
	return to, nil
}

func destinationOf(signal, endpoint string, getenv func(string) string) (*receiver, error) {
	variable := "OTEL_" + signal + "_EXPORTER"
	set := endpoint != "" || getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || getenv("OTEL_EXPORTER_OTLP_"+signal+"_ENDPOINT") != ""
	switch name := getenv(variable); {
	case name == "none", name == "" && !set:
		return nil, nil
	case name != "" && name != "otlp":
		return nil, fmt.Errorf("%s is %q; kvshield takes otlp or none (Prometheus reads /kvshield/metrics in any case)", variable, name)
	}
	protocol := getenv("OTEL_EXPORTER_OTLP_" + signal + "_PROTOCOL")
	if protocol == "" {
		protocol = getenv("OTEL_EXPORTER_OTLP_PROTOCOL")
	}
	r := &receiver{protocol: protocol}
	if endpoint != "" {
		u, err := url.Parse(endpoint)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return nil, fmt.Errorf("the OTLP endpoint %q is no address such as http://127.0.0.1:4318", endpoint)
		}
		if r.url = endpoint; protocol == "" && u.Port() == portGRPC {
			r.protocol = protocolGRPC
		}
	}
	switch r.protocol {
	case "":
		r.protocol = protocolHTTP
	case protocolGRPC, protocolHTTP:
	default:
		return nil, fmt.Errorf("the OTLP protocol %q is not known; set OTEL_EXPORTER_OTLP_PROTOCOL to %s or %s", r.protocol, protocolHTTP, protocolGRPC)
	}
	return r, nil
}

func (r *receiver) spanExporter(ctx context.Context) (sdktrace.SpanExporter, error) {
	if r.protocol == protocolGRPC {
		var o []otlptracegrpc.Option
		if r.url != "" {
			o = append(o, otlptracegrpc.WithEndpointURL(r.url))
		}
		return otlptracegrpc.New(ctx, o...)
	}
	var o []otlptracehttp.Option
	if r.url != "" {
		o = append(o, otlptracehttp.WithEndpointURL(strings.TrimSuffix(r.url, "/")+"/v1/traces"))
	}
	return otlptracehttp.New(ctx, o...)
}

func (r *receiver) metricExporter(ctx context.Context) (sdkmetric.Exporter, error) {
	if r.protocol == protocolGRPC {
		var o []otlpmetricgrpc.Option
		if r.url != "" {
			o = append(o, otlpmetricgrpc.WithEndpointURL(r.url))
		}
		return otlpmetricgrpc.New(ctx, o...)
	}
	var o []otlpmetrichttp.Option
	if r.url != "" {
		o = append(o, otlpmetrichttp.WithEndpointURL(strings.TrimSuffix(r.url, "/")+"/v1/metrics"))
	}
	return otlpmetrichttp.New(ctx, o...)
}
