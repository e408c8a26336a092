package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"runtime"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/kvshield/kvshield/adapters/beacon"
	"github.com/kvshield/kvshield/proxy"
)

// upstream is a shielded program that somebody else started.
type upstream struct {
	name, address string
	program       *beacon.Program
	front         *front
	describe      func(*status) // adds what only this engine has to tell; nil: nothing
	since         time.Time
	last          atomic.Pointer[beacon.Answer]
	reason        atomic.Pointer[string]
}

func serveUpstream(ctx context.Context, f *serveFlags, p *front, args []string) error {
	if f.model != "" || len(args) > 0 {
		return usagef("--upstream and --ollama-host name an engine that runs already; leave out -m and llama-server's arguments, or it")
	}
	u, err := f.findUpstream(ctx, p)
	if err != nil {
		return err
	}
	listener, err := f.open(p)
	if err != nil {
		return err
	}
	defer listener.Close()
	a := u.last.Load()
	protection := fmt.Sprintf("mode %s, TEE %s", a.Mode, a.Backend)
	if !a.Hardware {
		protection += ": no hardware protection"
	}
	say("serving %s on %s://%s (%s)", u.name, p.scheme, listener.Addr(), protection)
	reloadKeys(ctx, p.config.Keys)
	t, err := f.telemetryFlags.start(ctx, u.measured(f), listener.Addr(), f.last, p.config.Log)
	if err != nil {
		return err
	}
	defer t.Close()
	c := p.config
	c.Dial, c.State, c.Status = u.dial, u.state, u.status
	return proxy.Serve(ctx, listener, t.Handler(proxy.New(t.Attach(c))), p.serve)
}

func (f *serveFlags) findUpstream(ctx context.Context, p *front) (*upstream, error) {
	switch {
	case f.upstream != "" && f.ollamaHost != "":
		return nil, usagef("--upstream and --ollama-host each name an engine; give one of them")
	case f.ollamaHost != "":
		return findOllama(ctx, f, p)
	}
	to, err := url.Parse(f.upstream)
	if err != nil || to.Scheme != "http" || to.Host == "" || to.Path != "" && to.Path != "/" || to.RawQuery != "" {
		return nil, usagef("--upstream %s: it takes an address such as http://127.0.0.1:11434", f.upstream)
	}
	if ip := net.ParseIP(to.Hostname()); ip == nil || !ip.IsLoopback() || to.Port() == "" {
		return nil, usagef("--upstream %s: it takes a port of this machine by its loopback address, such as http://127.0.0.1:11434", f.upstream)
	}
	return newUpstream(p, f.upstream, to.Host)
}

func newUpstream(p *front, name, address string) (*upstream, error) {
	u := &upstream{name: name, address: address, front: p, since: time.Now().UTC().Truncate(time.Second)}
	if err := p.oneTenant(); err != nil {
		return nil, err
	}
	_, text, _ := net.SplitHostPort(address)
	port, err := strconv.Atoi(text)
	if err != nil {
		return nil, err
	}
	program, a, err := beacon.Find(port)
	if err != nil {
		return nil, fmt.Errorf("%s is not known to be shielded: %w; start it with kvshield run -- PROGRAM", name, err)
	}
	u.program = program
	u.last.Store(&a)
	return u, nil
}

// oneTenant is for an engine that cannot keep tenants apart: one that somebody else started, and any Ollama. Nor can it be told which slot to use. Where keys do not share there
// may be one tenant, now and whenever the keys are read again.
func (p *front) oneTenant() error {
	p.config.Slots = nil
	if p.tenants == nil {
		return nil
	}
	p.tenants, p.config.Tenants, p.alone = nil, nil, true
	p.config.Keys.Check = func(tenants int) error {
		if tenants == 1 {
			return nil
		}
		return errors.New("the keys of several tenants cannot be kept apart in Ollama, nor in an engine that kvshield serve did not start; have it start llama-server with -m, give one name to all keys, or let keys share with --share-prefix")
	}
	return p.config.Keys.Check(p.config.Keys.Tenants())
}

func (u *upstream) dial(ctx context.Context) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", u.address)
	if err != nil {
		return nil, err
	}
	// Asked after connecting: whoever took the port over in between is noticed.
	a, err := u.program.Check()
	if err != nil {
		reason := "the engine is not known to be shielded: " + err.Error()
		u.reason.Store(&reason)
		c.Close()
		return nil, err
	}
	u.last.Store(&a)
	u.reason.Store(nil)
	return c, nil
}

// state is always ready to try: each connection is checked.
func (u *upstream) state() proxy.State {
	s := proxy.State{Ready: true, RetryAfter: retryAfter}
	if reason := u.reason.Load(); reason != nil {
		s.Reason = *reason
	}
	return s
}

func (u *upstream) status() any {
	a, err := u.program.Check()
	s := status{Health: health{Ready: err == nil, Starts: 1}, Keys: u.front.keys(), Since: u.since, Goroutines: runtime.NumGoroutine()}
	if err != nil {
		s.Health.Reason = err.Error()
		a = *u.last.Load()
	}
	s.Mode = a.Mode
	s.Enclave = &enclaveStatus{Backend: a.Backend, Hardware: a.Hardware, Statement: a.Statement}
	if u.describe != nil {
		u.describe(&s)
	}
	s.Transitions = &transitions{Count: a.Transitions, Bytes: a.Bytes, Shielded: a.Shielded, Refused: a.Refused, Fatal: a.Ended}
	return s
}
