package main

import (
	"context"
	"fmt"
	"net"
	"os"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/enclave"
)

// engine is what is started, and started again when it ends.
type engine interface {
	Dial(context.Context) (net.Conn, error)
	Done() <-chan struct{}
	Err() error // how it ended
	Stop()
	Kill()
}

type running struct{ engine }

// newServerHost is a host of a llama-server, whose model can be shielded.
func newServerHost(ctx context.Context, f *serveFlags, program string, args []string) (*host, error) {
	h, err := newHost(ctx, f, program)
	if err != nil {
		return nil, err
	}
	h.name, h.args, h.launch = f.model, args, h.startServer
	if err := h.inspect(ctx); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

// inspect finds out before the engine is started whether its model can be shielded at all.
func (h *host) inspect(ctx context.Context) error {
	if h.shield == nil {
		return nil
	}
	model, err := h.shield.Inspect(ctx, h.flags.model)
	if err != nil {
		return fmt.Errorf("%s: %w", h.flags.model, err)
	}
	if model.Action == enclave.Pass && model.Layers == 0 { // an embedding model has layers, and keeps nothing
		return fmt.Errorf("%s is not a language model (architecture %q); give a model that generates text", h.flags.model, model.Architecture)
	}
	h.passes = model.Action == enclave.Pass
	return nil
}

// seen is whether the engine's model came by the hook.
func (h *host) seen() bool {
	e := h.shield.Events()
	return e.Shielded > 0 || h.passes && e.Passed > 0
}

// startServer starts a llama-server and waits until it has loaded its model, shielded.
func (h *host) startServer(ctx context.Context) (engine, error) {
	c := llamacpp.ServerConfig{Program: h.program, Model: h.flags.model, Socket: h.dir.Path("engine.sock"), Args: h.args, Env: h.env}
	if h.flags.verbose {
		c.Output = os.Stderr
	}
	s, err := llamacpp.StartServer(c)
	if err != nil {
		return nil, err
	}
	if err := s.WaitHealthy(ctx); err != nil {
		s.Kill()
		return nil, err
	}
	if h.shield != nil && !h.seen() {
		s.Kill()
		return nil, fmt.Errorf("%s loaded its model past kvshield's hook; use a build of llama.cpp with shared libraries (BUILD_SHARED_LIBS=ON)", h.program)
	}
	return s, nil
}

func (h *host) byHand() string {
	if h.flags.model == "" {
		return h.program + " serve"
	}
	return h.program + " -m " + h.flags.model
}
