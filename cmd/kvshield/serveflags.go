package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/kvshield/kvshield/proxy"
	"github.com/kvshield/kvshield/proxy/keys"
	"github.com/kvshield/kvshield/proxy/limit"
	"github.com/kvshield/kvshield/proxy/policy"
	"github.com/kvshield/kvshield/proxy/tenant"
)

// proxyFlags are what serve puts before an engine.
type proxyFlags struct {
	tlsCert, tlsKey   string
	tlsGenerate       bool
	apiKeyFile        string
	sharePrefix       bool
	maxBody           string
	maxHeader         string
	headerTimeout     time.Duration
	idleTimeout       time.Duration
	requestTimeout    time.Duration
	concurrent, queue int
	queueTimeout      time.Duration
	drain             time.Duration
	allow             []string
	nameSlots         bool
}

func (f *proxyFlags) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.tlsCert, "tls-cert", "", "certificate to serve HTTPS with, a PEM file")
	fs.StringVar(&f.tlsKey, "tls-key", "", "the certificate's key, a PEM file")
	fs.BoolVar(&f.tlsGenerate, "tls-generate", false, "serve HTTPS with a certificate made for this run; its fingerprint is printed")
	fs.StringVar(&f.apiKeyFile, "api-key-file", "", "let in only who has a key of this file: one a line, name:key or key; read again on SIGHUP")
	fs.BoolVar(&f.sharePrefix, "share-prefix", false, "with API keys: let requests of one key reuse what another key's left in the engine's cache")
	fs.StringVar(&f.maxBody, "max-body", "64MiB", "largest body of a request (0: no limit)")
	fs.StringVar(&f.maxHeader, "max-header", "64KiB", "largest header of a request")
	fs.DurationVar(&f.headerTimeout, "read-header-timeout", 10*time.Second, "how long a client may take to send a request's header")
	fs.DurationVar(&f.idleTimeout, "idle-timeout", 2*time.Minute, "how long a connection may be idle between requests")
	fs.DurationVar(&f.requestTimeout, "request-timeout", 0, "how long a request may take from its turn to its end (0: as long as it takes)")
	fs.IntVar(&f.concurrent, "max-concurrent", 0, "how many requests the engine gets at a time (0: no limit; with API keys that are kept apart: its slots)")
	fs.IntVar(&f.queue, "queue", 64, "how many requests may wait for their turn; more are answered 429")
	fs.DurationVar(&f.queueTimeout, "queue-timeout", time.Minute, "how long a request may wait for its turn before it is answered 503 (0: for ever)")
	fs.DurationVar(&f.drain, "drain", 10*time.Second, "how long running answers may go on after SIGTERM")
	fs.StringSliceVar(&f.allow, "allow", nil, "let through what is refused otherwise: "+strings.Join(policy.Names(), ", "))
	fs.BoolVar(&f.nameSlots, "name-slots", true, "name the engine's slot in each request, so that what the enclave costs is known by request; off: the engine chooses, and may use its prompt cache in host memory")
	_ = cmd.RegisterFlagCompletionFunc("allow", cobra.FixedCompletions(policy.Names(), cobra.ShellCompDirectiveNoFileComp))
}

// front is what the flags make.
type front struct {
	serve   proxy.ServeConfig
	config  proxy.Config
	scheme  string
	tenants *tenant.Pool // nil when keys share, or there are none, or are all of one tenant
	alone   bool         // there is one tenant, and may not be another
}

// pool of the engine's slots; nil where nobody needs to know which request is in which.
func (f *front) pool() *tenant.Pool {
	if f.tenants != nil {
		return f.tenants
	}
	return f.config.Slots
}

func (f *proxyFlags) front(log *slog.Logger) (*front, error) {
	p := &front{scheme: "http"}
	body, err := size("--max-body", f.maxBody, 0)
	if err != nil {
		return nil, err
	}
	header, err := size("--max-header", f.maxHeader, 1<<10)
	if err != nil {
		return nil, err
	}
	if f.concurrent < 0 || f.queue < 0 {
		return nil, usagef("--max-concurrent and --queue take 0 or more")
	}
	for name, d := range map[string]time.Duration{"read-header-timeout": f.headerTimeout, "idle-timeout": f.idleTimeout, "request-timeout": f.requestTimeout, "queue-timeout": f.queueTimeout, "drain": f.drain} {
		if d < 0 {
			return nil, usagef("--%s takes a time such as 10s", name)
		}
	}
	rules, err := policy.New(f.allow)
	if err != nil {
		return nil, usagef("--allow: %v", err)
	}
	p.config = proxy.Config{Log: log, Policy: rules, MaxBody: body, RequestTimeout: f.requestTimeout, DialPatience: time.Second, Limit: limit.New(f.concurrent, f.queue, f.queueTimeout)}
	p.serve = proxy.ServeConfig{Drain: f.drain, MaxHeader: int(header), ReadHeaderTimeout: f.headerTimeout, IdleTimeout: f.idleTimeout}
	if err := f.readKeys(p); err != nil {
		return nil, err
	}
	if p.tenants == nil && f.nameSlots {
		p.config.Slots = &tenant.Pool{}
	}
	return p, nil
}

func (f *proxyFlags) readKeys(p *front) error {
	if f.apiKeyFile == "" {
		if f.sharePrefix {
			return usagef("--share-prefix is for API keys; add --api-key-file, or leave it out")
		}
		return nil
	}
	ring, warning, err := keys.Load(f.apiKeyFile)
	if err != nil {
		return err
	}
	if warning != "" {
		say("%s", warning)
	}
	p.config.Keys = ring
	if !f.sharePrefix {
		p.tenants = &tenant.Pool{Timeout: f.queueTimeout}
		p.config.Tenants = p.tenants
	}
	return nil
}

// secure makes the listener's certificate.
func (f *proxyFlags) secure(p *front, listener net.Addr) error {
	given := f.tlsCert != "" || f.tlsKey != ""
	switch {
	case !given && !f.tlsGenerate:
		return nil
	case given && f.tlsGenerate:
		return usagef("--tls-generate makes a certificate; leave out --tls-cert and --tls-key, or it")
	case given && (f.tlsCert == "" || f.tlsKey == ""):
		return usagef("--tls-cert and --tls-key go together")
	}
	cert, err := f.certificate(listener)
	if err != nil {
		return err
	}
	p.serve.TLS, p.scheme = proxy.TLS(cert), "https"
	return nil
}

func (f *proxyFlags) certificate(listener net.Addr) (tls.Certificate, error) {
	if !f.tlsGenerate {
		cert, err := tls.LoadX509KeyPair(f.tlsCert, f.tlsKey)
		if err != nil {
			return cert, fmt.Errorf("cannot use the certificate: %w", err)
		}
		return cert, nil
	}
	host, _, _ := net.SplitHostPort(listener.String())
	cert, err := proxy.Generate(host)
	if err == nil {
		say("certificate made for this run, SHA-256 %s", proxy.Fingerprint(cert))
	}
	return cert, err
}

// reloadKeys reads the keys again on SIGHUP, until ctx ends.
func reloadKeys(ctx context.Context, ring *keys.Ring) {
	if ring == nil {
		return
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	go func() {
		defer signal.Stop(hup)
		for {
			select {
			case <-ctx.Done():
				return
			case <-hup:
			}
			warning, err := ring.Reload()
			switch {
			case err != nil:
				say("the API keys stay as they were: %v", err)
			case warning != "":
				say("the API keys were read again; %s", warning)
			default:
				say("the API keys were read again")
			}
		}
	}()
}

func size(flag, text string, least uint64) (int64, error) {
	n, err := humanize.ParseBytes(text)
	if err != nil || n < least || n > 1<<40 {
		return 0, usagef("%s %s: it takes a size such as 64MiB", flag, text)
	}
	return int64(n), nil
}

// apart are the arguments that leave a llama-server no cache but its slots'. They come last, and so win.
var apart = []string{"--cache-ram", "0"}

// shares are arguments of llama-server, and their variables, that make it keep more of a request than its slot does.
var shares = []string{"--model-draft", "-md", "--spec-draft-model", "--spec-draft-hf", "-hfd", "-hfrd", "--hf-repo-draft", "--spec-type", "--spec-default",
	"--lookup-cache-static", "-lcs", "--lookup-cache-dynamic", "-lcd", "--api-prefix", "--models-dir", "--models-preset", "--tools", "--agent", "-ag"}

var sharesEnv = []string{"LLAMA_ARG_SPEC_TYPE", "LLAMA_ARG_MODEL_DRAFT", "LLAMA_ARG_SPEC_DRAFT_MODEL", "LLAMA_ARG_SPEC_DRAFT_HF_REPO", "LLAMA_ARG_HFD_REPO",
	"LLAMA_ARG_API_PREFIX", "LLAMA_ARG_TOOLS", "LLAMA_ARG_AGENT", "LLAMA_ARG_MODELS_DIR", "LLAMA_ARG_MODELS_PRESET"}

// keptApart are the engine's arguments for tenants that must not meet.
func keptApart(args []string) ([]string, error) {
	for _, a := range args {
		name, _, _ := strings.Cut(a, "=")
		if slices.Contains(shares, name) {
			return nil, usagef("llama-server's %s is not known to keep API keys apart; leave it out, or let keys share with --share-prefix", name)
		}
	}
	for _, name := range sharesEnv {
		if os.Getenv(name) != "" {
			return nil, usagef("%s is not known to keep API keys apart; unset it, or let keys share with --share-prefix", name)
		}
	}
	return append(slices.Clone(args), apart...), nil
}
