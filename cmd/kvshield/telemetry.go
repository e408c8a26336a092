package main

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/proxy"
	"github.com/kvshield/kvshield/telemetry"
	"github.com/kvshield/kvshield/telemetry/live"
)

// Engines by the names that spans and metrics have for them.
const (
	providerLlama  = "llama.cpp"
	providerOllama = "ollama"
)

// telemetryFlags say what is measured, and who is told.
type telemetryFlags struct {
	telemetry   bool
	otlp        string
	traceLayers float64
	last        *live.Errors
}

func (f *telemetryFlags) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.BoolVar(&f.telemetry, "telemetry", true, "measure what each request and token costs, for /kvshield/metrics, /kvshield/ and OTLP")
	fs.StringVar(&f.otlp, "otlp", "", "send spans and metrics to this OTLP receiver, such as http://127.0.0.1:4318 (default: what the OTEL_ variables say, else nowhere)")
	fs.Float64Var(&f.traceLayers, "trace-layers", 0, "part of the requests whose trace has a span for each layer, 0 to 1")
}

func (f *telemetryFlags) check() error {
	if f.traceLayers < 0 || f.traceLayers > 1 {
		return usagef("--trace-layers %v: it takes a part of the requests, 0 to 1", f.traceLayers)
	}
	if !f.telemetry && (f.otlp != "" || f.traceLayers > 0) {
		return usagef("--otlp and --trace-layers are telemetry; leave them out, or --telemetry=false")
	}
	return nil
}

// start measures, unless that is turned off: then nil does nothing.
func (f *telemetryFlags) start(ctx context.Context, c telemetry.Config, listener net.Addr, last *live.Errors, log *slog.Logger) (*telemetry.Telemetry, error) {
	if !f.telemetry {
		return nil, nil
	}
	if a, ok := listener.(*net.TCPAddr); ok {
		c.Address, c.Port = a.IP.String(), a.Port
	}
	c.OTLP, c.Layers, c.Version, c.Errors, c.Log = f.otlp, f.traceLayers, version(), last, log
	return telemetry.Start(ctx, c)
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return ""
}

// measure begins telemetry of a host, before its engine is started.
func (h *host) measure(ctx context.Context, listener net.Addr) (err error) {
	f := h.flags
	c := telemetry.Config{Provider: providerLlama, Model: h.model(), Mode: f.Mode, State: h.measured}
	if isOllama(h.program) {
		c.Provider = providerOllama
	}
	if h.shield != nil {
		c.Engine = h.shield
	}
	h.telemetry, err = f.telemetryFlags.start(ctx, c, listener, f.last, h.log)
	return err
}

// model by the name that clients are shown; empty where requests name one.
func (h *host) model() string {
	if h.flags.model == "" {
		return ""
	}
	return filepath.Base(h.flags.model)
}

func (h *host) measured() telemetry.State {
	st := h.state()
	s := telemetry.State{Ready: st.Ready, Reason: st.Reason, Starts: h.starts.Load(), TEE: h.report.Backend, Hardware: h.report.Hardware, Statement: h.report.Statement}
	if h.shield != nil {
		e := h.shield.Events()
		s.Shielded, s.Refused = e.Shielded, len(e.Refusals)
	}
	return s
}

// watched is where telemetry attaches to the proxy.
func (h *host) watched(c proxy.Config) proxy.Config { return h.telemetry.Attach(c) }

// measured is the telemetry of an engine that somebody else started: its graphs are in another process, so there are totals only.
func (u *upstream) measured(f *serveFlags) telemetry.Config {
	c := telemetry.Config{Provider: providerLlama, Mode: u.last.Load().Mode, Engine: u, State: u.stands}
	if f.ollamaHost != "" {
		c.Provider = providerOllama
	}
	return c
}

// Totals implements telemetry.Counter. An engine that is away stays as it was.
func (u *upstream) Totals() meter.Totals {
	if a, err := u.program.Check(); err == nil {
		u.last.Store(&a)
	}
	a := u.last.Load()
	return meter.Totals{Transitions: a.Transitions, Bytes: a.Bytes}
}

func (u *upstream) stands() telemetry.State {
	a, st := u.last.Load(), u.state()
	return telemetry.State{Ready: st.Ready && st.Reason == "", Reason: st.Reason, Starts: 1, Shielded: a.Shielded, Refused: a.Refused, TEE: a.Backend, Hardware: a.Hardware, Statement: a.Statement}
}
