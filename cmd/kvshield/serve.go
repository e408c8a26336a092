package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/spf13/cobra"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/adapters/watch"
	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/proxy"
)

const (
	retryAfter   = 2 * time.Second
	maxRestarts  = 10 // in a row, without the engine having become ready
	soundAfter   = 30 * time.Second
	enclaveWait  = 100 * time.Millisecond
	restartPause = 200 * time.Millisecond
)

type serveFlags struct {
	options
	proxyFlags
	model, listen, engine, upstream string
	verbose                         bool
}

func newServe() *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   "serve -m MODEL.gguf [flags] [-- llama-server arguments]",
		Short: "run a shielded llama-server behind an OpenAI-compatible address",
		Long: `Starts a stock llama-server on a Unix socket that nobody else can open, shields its model, and passes
requests on to it from --listen. When the engine or the enclave dies, clients get an error and both are
started again.`,
		Example: `  kvshield serve -m model.gguf
  kvshield serve -m model.gguf --listen 127.0.0.1:9000 -- -c 8192 -np 4`,
		Args: exactly(func(cmd *cobra.Command, args []string) error {
			if at := cmd.ArgsLenAtDash(); len(args) > 0 && at != 0 {
				return fmt.Errorf("unexpected argument %q; arguments for llama-server go behind --", args[0])
			}
			return nil
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.model == "" && f.upstream == "" {
				return usagef("name a model with -m MODEL.gguf")
			}
			if err := f.checkMode(); err != nil {
				return err
			}
			return serve(cmd.Context(), &f, args)
		},
	}
	f.options.register(cmd)
	f.proxyFlags.register(cmd)
	cmd.Flags().StringVarP(&f.model, "model", "m", "", "path of the model, a GGUF file")
	cmd.Flags().StringVar(&f.listen, "listen", "127.0.0.1:8080", "address to serve on")
	cmd.Flags().StringVar(&f.engine, "engine", "llama-server", "llama-server to run: a name or a path")
	cmd.Flags().StringVar(&f.upstream, "upstream", "", "serve an engine that runs under kvshield run already, such as http://127.0.0.1:11434, instead of starting one")
	cmd.Flags().BoolVarP(&f.verbose, "verbose", "v", false, "show what llama-server prints")
	_ = cmd.MarkFlagFilename("model", "gguf")
	return cmd
}

func serve(ctx context.Context, f *serveFlags, args []string) error {
	log, err := f.Logger()
	if err != nil {
		return err
	}
	p, err := f.front(log)
	if err != nil {
		return err
	}
	if f.upstream != "" {
		return serveUpstream(ctx, f, p, args)
	}
	if p.tenants != nil {
		if args, err = keptApart(args); err != nil {
			return err
		}
	}
	program, err := llamacpp.Find(f.engine)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", f.listen)
	if err != nil {
		return fmt.Errorf("cannot listen on %s: %w; choose another address with --listen", f.listen, err)
	}
	defer listener.Close()
	if err := f.secure(p, listener.Addr()); err != nil {
		return err
	}
	h, err := newHost(ctx, f, program, args)
	if err != nil {
		return err
	}
	h.front = p
	defer h.close()
	if err := h.startFirst(ctx); err != nil {
		return err
	}
	say("serving %s on %s://%s (%s)", f.model, p.scheme, listener.Addr(), h.protection)
	return h.serve(ctx, listener)
}

// host is one engine with what shields it, started again as often as it takes.
type host struct {
	flags      *serveFlags
	program    string
	args       []string
	log        *slog.Logger
	dir        *supervisor.RuntimeDir
	shield     *supervisor.Supervisor // nil in mode off
	env        []string
	passes     bool // its model keeps nothing, and is opened as it is
	protection string
	front      *front
	since      time.Time
	starts     atomic.Int64
	server     atomic.Pointer[llamacpp.Server]
	reason     atomic.Pointer[string]   // why requests cannot be answered; nil when they can
	endWatch   func() []watch.Violation // nil while nothing is watched
}

func newHost(ctx context.Context, f *serveFlags, program string, args []string) (*host, error) {
	cfg, err := f.Config()
	if err != nil {
		return nil, err
	}
	h := &host{flags: f, program: program, args: args, log: cfg.Log, env: os.Environ(), since: time.Now().UTC().Truncate(time.Second)}
	h.notReady("the engine is starting")
	if f.Mode == modeOff {
		h.protection = "mode off: the KV cache is in clear"
		h.dir, err = supervisor.NewRuntimeDir(f.RuntimeDir)
		return h, err
	}
	cfg.EnclaveLost = func() { h.notReady("the enclave died and is started again") }
	// The supervisor outlives the signal that ends us, so that answers in progress can be finished.
	if h.shield, err = supervisor.New(context.WithoutCancel(ctx), cfg); err != nil {
		return nil, err
	}
	if err := h.prepare(ctx); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

// prepare finds out before the engine is started whether its model can be shielded at all.
func (h *host) prepare(ctx context.Context) error {
	h.dir = h.shield.RuntimeDir()
	h.env = h.shield.Environment(os.Environ())
	model, err := h.shield.Inspect(ctx, h.flags.model)
	if err != nil {
		return fmt.Errorf("%s: %w", h.flags.model, err)
	}
	if model.Action == enclave.Pass && model.Layers == 0 { // an embedding model has layers, and keeps nothing
		return fmt.Errorf("%s is not a language model (architecture %q); give a model that generates text", h.flags.model, model.Architecture)
	}
	h.passes = model.Action == enclave.Pass
	report, err := h.shield.Attest(ctx, nil)
	if err != nil {
		return err
	}
	h.protection = fmt.Sprintf("mode %s, TEE %s", h.flags.Mode, report.Backend)
	if !report.Hardware {
		h.protection += ": no hardware protection"
	}
	h.endWatch = watchTree(context.WithoutCancel(ctx), h.shield)
	return nil
}

// seen is whether the engine's model came by the hook.
func (h *host) seen() bool {
	e := h.shield.Events()
	return e.Shielded > 0 || h.passes && e.Passed > 0
}

func (h *host) notReady(reason string) { h.reason.Store(&reason) }

// start starts the engine and waits until it has loaded its model, shielded.
func (h *host) start(ctx context.Context) error {
	c := llamacpp.ServerConfig{Program: h.program, Model: h.flags.model, Socket: h.dir.Path("engine.sock"), Args: h.args, Env: h.env}
	if h.flags.verbose {
		c.Output = os.Stderr
	}
	if h.front.tenants != nil {
		h.front.tenants.Resize(0) // nothing that was meant for the engine before reaches this one
	}
	s, err := llamacpp.StartServer(c)
	if err != nil {
		return err
	}
	if err := s.WaitHealthy(ctx); err != nil {
		s.Kill()
		return err
	}
	if h.shield != nil && !h.seen() {
		s.Kill()
		return fmt.Errorf("%s loaded its model past kvshield's hook; use a build of llama.cpp with shared libraries (BUILD_SHARED_LIBS=ON)", h.program)
	}
	if h.front.tenants != nil {
		slots, err := s.Slots(ctx)
		if err != nil {
			s.Kill()
			return err
		}
		h.front.tenants.KeepsNothing = h.passes
		defer h.front.tenants.Resize(slots)
	}
	h.starts.Add(1)
	h.server.Store(s)
	h.reason.Store(nil)
	return nil
}

func (h *host) startFirst(ctx context.Context) error {
	done := progress("loading %s", h.flags.model)
	err := h.start(ctx)
	done()
	return h.explain(err)
}

// explain says why an engine that ended did so, in one line: what the shield knows, else its own last words.
func (h *host) explain(err error) error {
	var exit *llamacpp.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if h.shield != nil {
		e := h.shield.Events()
		for _, reasons := range [][]string{e.Refusals, e.Fatal} {
			if len(reasons) > 0 {
				return errors.New(reasons[len(reasons)-1])
			}
		}
	}
	if h.flags.verbose || exit.Tail == "" {
		return fmt.Errorf("%w; run it by hand to see why: %s -m %s", err, h.program, h.flags.model)
	}
	return fmt.Errorf("%w; its last words:\n  %s", err, strings.ReplaceAll(exit.Tail, "\n", "\n  "))
}

// serve answers requests until ctx ends, keeping the engine alive meanwhile.
func (h *host) serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		if err := h.keepAlive(ctx); err != nil {
			cancel(err)
		}
	}()
	reloadKeys(ctx, h.front.config.Keys, func() error { return nil })
	err := proxy.Serve(ctx, l, h.handler(), h.front.serve)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// handler is what answers clients.
func (h *host) handler() http.Handler {
	c := h.front.config
	c.Dial, c.State, c.Status = h.dial, h.state, h.status
	return proxy.New(h.watched(c))
}

// watched is where telemetry attaches: an Observer for the proxy's events, pages of its own below /kvshield/ in Own.
func (h *host) watched(c proxy.Config) proxy.Config { return c }

func (h *host) dial(ctx context.Context) (net.Conn, error) { return h.server.Load().Dial(ctx) }

func (h *host) state() proxy.State {
	if reason := h.reason.Load(); reason != nil {
		return proxy.State{Reason: *reason, RetryAfter: retryAfter}
	}
	return proxy.State{Ready: true}
}

// keepAlive starts the engine again whenever it ends, with growing pauses.
func (h *host) keepAlive(ctx context.Context) error {
	pauses := backoff.NewExponentialBackOff(backoff.WithInitialInterval(restartPause), backoff.WithMaxInterval(10*time.Second), backoff.WithMaxElapsedTime(0))
	failures := 0
	for began := time.Now(); ; began = time.Now() {
		select {
		case <-ctx.Done():
			return nil
		case <-h.server.Load().Done():
		}
		h.notReady("the engine ended and is started again")
		h.log.Error("the engine ended; starting it again", "how", h.server.Load().Err())
		if time.Since(began) > soundAfter {
			pauses.Reset()
		}
		for failures = 0; ; failures++ {
			if !sleep(ctx, pauses.NextBackOff()) || !h.awaitEnclave(ctx) {
				return nil
			}
			err := h.start(ctx)
			if err == nil {
				break
			}
			h.log.Error("the engine did not start again", "error", h.explain(err))
			if failures == maxRestarts {
				return fmt.Errorf("the engine did not start again in %d tries: %w", maxRestarts, h.explain(err))
			}
		}
		say("serving again")
	}
}

// awaitEnclave waits until there is an enclave: without one every engine would be turned away.
func (h *host) awaitEnclave(ctx context.Context) bool {
	for h.shield != nil && h.shield.EnclavePID() == 0 {
		if !sleep(ctx, enclaveWait) {
			return false
		}
	}
	return ctx.Err() == nil
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (h *host) close() {
	if s := h.server.Load(); s != nil {
		s.Stop()
	}
	if h.endWatch != nil {
		h.endWatch()
	}
	if h.shield != nil {
		h.shield.Close()
	} else if h.dir != nil {
		h.dir.Remove()
	}
}
