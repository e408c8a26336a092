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
	"github.com/kvshield/kvshield/telemetry"
	"github.com/kvshield/kvshield/telemetry/live"
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
	telemetryFlags
	model, listen, engine, upstream, ollamaHost string
	verbose                                     bool
}

func newServe() *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   "serve {-m MODEL.gguf | --engine ollama | --ollama-host HOST:PORT | --upstream URL} [flags] [-- llama-server arguments]",
		Short: "run a shielded llama-server or Ollama behind an address of your choice",
		Long: `Starts a stock llama-server on a Unix socket that nobody else can open, shields its model, and passes
requests on to it from --listen. When the engine or the enclave dies, clients get an error and both are
started again.

With --engine ollama it starts ` + "`ollama serve`" + ` instead, on a port of the loopback address, and shields every model that
Ollama loads; set it up by its own variables (OLLAMA_…). Of the generation that has its engine inside (0.17 and
older), kvshield-ollama takes ollama's place: --engine kvshield-ollama. With --ollama-host or --upstream it starts nothing,
and serves what runs under ` + "`kvshield run`" + ` (or as kvshield-ollama) already.`,
		Example: `  kvshield serve -m model.gguf
  kvshield serve -m model.gguf --listen 127.0.0.1:9000 -- -c 8192 -np 4
  kvshield serve --engine ollama --listen 127.0.0.1:11434
  kvshield serve --ollama-host 127.0.0.1:11434 --tls-generate --listen 0.0.0.0:8443`,
		Args: exactly(func(cmd *cobra.Command, args []string) error {
			if at := cmd.ArgsLenAtDash(); len(args) > 0 && at != 0 {
				return fmt.Errorf("unexpected argument %q; arguments for llama-server go behind --", args[0])
			}
			return nil
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.checkMode(); err != nil {
				return err
			}
			return serve(cmd.Context(), &f, args)
		},
	}
	f.options.register(cmd)
	f.proxyFlags.register(cmd)
	f.telemetryFlags.register(cmd)
	cmd.Flags().StringVarP(&f.model, "model", "m", "", "path of the model, a GGUF file")
	cmd.Flags().StringVar(&f.listen, "listen", "127.0.0.1:8080", "address to serve on")
	cmd.Flags().StringVar(&f.engine, "engine", "llama-server", "what to run: llama-server, ollama or kvshield-ollama, by its name or a path")
	cmd.Flags().StringVar(&f.upstream, "upstream", "", "serve an engine that runs under kvshield run already, such as http://127.0.0.1:11434, instead of starting one")
	cmd.Flags().StringVar(&f.ollamaHost, "ollama-host", "", "serve an Ollama that runs shielded already, such as 127.0.0.1:11434 or whatever OLLAMA_HOST may hold, instead of starting one")
	cmd.Flags().BoolVarP(&f.verbose, "verbose", "v", false, "show what the engine prints")
	_ = cmd.MarkFlagFilename("model", "gguf")
	return cmd
}

func serve(ctx context.Context, f *serveFlags, args []string) error {
	f.last = &live.Errors{}
	f.Failed = func(at time.Time, message string) { f.last.Add(at, "log", message) }
	log, err := f.Logger()
	if err != nil {
		return err
	}
	if err := f.telemetryFlags.check(); err != nil {
		return err
	}
	f.nameSlots = f.nameSlots && f.telemetry
	p, err := f.front(log)
	if err != nil {
		return err
	}
	switch {
	case f.upstream != "" || f.ollamaHost != "":
		return serveUpstream(ctx, f, p, args)
	case isOllama(f.engine):
		return serveOllama(ctx, f, p, args)
	case f.model == "":
		return usagef("name a model with -m MODEL.gguf, or an engine that has its own with --engine ollama")
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
	return serveEngine(ctx, f, p, func() (*host, error) { return newServerHost(ctx, f, program, args) })
}

// serveEngine starts an engine behind --listen, which is opened first.
func serveEngine(ctx context.Context, f *serveFlags, p *front, make func() (*host, error)) error {
	listener, err := f.open(p)
	if err != nil {
		return err
	}
	defer listener.Close()
	h, err := make()
	if err != nil {
		return err
	}
	h.front = p
	defer h.close()
	if err := h.measure(ctx, listener.Addr()); err != nil {
		return err
	}
	if err := h.startFirst(ctx); err != nil {
		return err
	}
	say("serving %s on %s://%s (%s)", h.name, p.scheme, listener.Addr(), h.protection)
	return h.serve(ctx, listener)
}

func (f *serveFlags) open(p *front) (net.Listener, error) {
	listener, err := net.Listen("tcp", f.listen)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w; choose another address with --listen", f.listen, err)
	}
	if err := f.secure(p, listener.Addr()); err != nil {
		listener.Close()
		return nil, err
	}
	return listener, nil
}

// host is one engine with what shields it, started again as often as it takes.
type host struct {
	flags      *serveFlags
	name       string // of what is served, for people
	program    string
	args       []string
	log        *slog.Logger
	dir        *supervisor.RuntimeDir
	shield     *supervisor.Supervisor // nil in mode off
	env        []string
	passes     bool // its model keeps nothing, and is opened as it is
	protection string
	report     enclave.Report // nothing in mode off
	telemetry  *telemetry.Telemetry
	front      *front
	since      time.Time
	starts     atomic.Int64
	launch     func(context.Context) (engine, error) // starts the engine, and returns when it answers
	describe   func(*status)                         // adds what only this engine has to tell; nil: nothing
	sweep      func()                                // ends what the engine left behind; nil: nothing
	server     atomic.Pointer[running]
	reason     atomic.Pointer[string]   // why requests cannot be answered; nil when they can
	endWatch   func() []watch.Violation // nil while nothing is watched
}

func newHost(ctx context.Context, f *serveFlags, program string) (*host, error) {
	cfg, err := f.Config()
	if err != nil {
		return nil, err
	}
	h := &host{flags: f, program: program, log: cfg.Log, env: os.Environ(), since: time.Now().UTC().Truncate(time.Second)}
	h.notReady("the engine is starting")
	if f.Mode == modeOff {
		h.protection = "mode off: the KV cache is in clear"
		h.dir, err = supervisor.NewRuntimeDir(f.RuntimeDir)
		return h, err
	}
	cfg.EnclaveLost = func() { h.notReady(enclaveDied) }
	if isOllama(program) { // it outlives the engines that end with the enclave
		cfg.EnclaveBack = h.enclaveBack
	}
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

func (h *host) prepare(ctx context.Context) error {
	h.dir = h.shield.RuntimeDir()
	h.env = h.shield.Environment(os.Environ())
	report, err := h.shield.Attest(ctx, nil)
	if err != nil {
		return err
	}
	h.report = report
	h.protection = fmt.Sprintf("mode %s, TEE %s", h.flags.Mode, report.Backend)
	if !report.Hardware {
		h.protection += ": no hardware protection"
	}
	h.endWatch = watchTree(context.WithoutCancel(ctx), h.shield)
	return nil
}

const enclaveDied = "the enclave died and is started again"

func (h *host) enclaveBack() {
	if r := h.reason.Load(); r != nil && *r == enclaveDied {
		h.reason.CompareAndSwap(r, nil)
	}
}

func (h *host) notReady(reason string) { h.reason.Store(&reason) }

func (h *host) start(ctx context.Context) error {
	if h.flags.model == "" { // it loads models later
		return h.startEngine(ctx)
	}
	end := h.telemetry.Shielding(h.model())
	err := h.startEngine(ctx)
	end(err)
	return err
}

func (h *host) startEngine(ctx context.Context) error {
	pool := h.front.pool()
	if pool != nil {
		pool.Resize(0) // nothing that was meant for the engine before reaches this one
	}
	s, err := h.launch(ctx)
	if err != nil {
		return err
	}
	if pool != nil { // only a llama-server has slots with names
		slots, err := s.(*llamacpp.Server).Slots(ctx)
		if err != nil && h.front.tenants != nil {
			s.Kill()
			return err
		}
		if err != nil {
			h.log.Warn("what the enclave costs is not known by request", "error", err)
			slots = -1
		}
		pool.KeepsNothing = h.passes
		defer pool.Resize(slots)
	}
	h.starts.Add(1)
	h.server.Store(&running{s})
	h.reason.Store(nil)
	return nil
}

func (h *host) startFirst(ctx context.Context) error {
	done := progress("loading %s", h.name)
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
	if h.shield != nil && h.flags.model != "" { // else the word is about one of many models
		e := h.shield.Events()
		for _, reasons := range [][]string{e.Refusals, e.Fatal} {
			if len(reasons) > 0 {
				return errors.New(reasons[len(reasons)-1])
			}
		}
	}
	if h.flags.verbose || exit.Tail == "" {
		return fmt.Errorf("%w; run it by hand to see why: %s", err, h.byHand())
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
	reloadKeys(ctx, h.front.config.Keys)
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
	return h.telemetry.Handler(proxy.New(h.watched(c)))
}

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
	h.telemetry.Close()
	if s := h.server.Load(); s != nil {
		s.Stop()
	}
	if h.sweep != nil {
		h.sweep()
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
