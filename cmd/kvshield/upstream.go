package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/kvshield/kvshield/adapters/beacon"
	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/proxy"
)

// lightBeacon answers for a run to whoever wants to put a proxy before one of its programs.
func lightBeacon(ctx context.Context, o *options, s *supervisor.Supervisor) error {
	report, err := s.Attest(ctx, nil)
	if err != nil {
		return err
	}
	return beacon.Serve(ctx, s.RuntimeDir().Root(), func() beacon.Answer {
		n, e := s.Statistics(), s.Events()
		return beacon.Answer{Mode: o.Mode, Backend: report.Backend, Hardware: report.Hardware, Statement: report.Statement, Enclave: s.EnclavePID() != 0,
			Transitions: n.Transitions, Bytes: n.Bytes, Shielded: e.Shielded, Refused: len(e.Refusals), Ended: len(e.Fatal)}
	})
}

// upstream is a shielded program that somebody else started.
type upstream struct {
	address string
	program *beacon.Program
	front   *front
	since   time.Time
	last    atomic.Pointer[beacon.Answer]
	reason  atomic.Pointer[string]
}

func serveUpstream(ctx context.Context, f *serveFlags, p *front, args []string) error {
	if f.model != "" || len(args) > 0 {
		return usagef("--upstream names an engine that runs already; leave out -m and llama-server's arguments, or it")
	}
	u, err := newUpstream(f, p)
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
	a := u.last.Load()
	protection := fmt.Sprintf("mode %s, TEE %s", a.Mode, a.Backend)
	if !a.Hardware {
		protection += ": no hardware protection"
	}
	say("serving %s on %s://%s (%s)", f.upstream, p.scheme, listener.Addr(), protection)
	reloadKeys(ctx, p.config.Keys, func() error { return u.oneTenant() })
	c := p.config
	c.Dial, c.State, c.Status = u.dial, u.state, u.status
	return proxy.Serve(ctx, listener, proxy.New(c), p.serve)
}

func newUpstream(f *serveFlags, p *front) (*upstream, error) {
	to, err := url.Parse(f.upstream)
	if err != nil || to.Scheme != "http" || to.Host == "" || to.Path != "" && to.Path != "/" || to.RawQuery != "" {
		return nil, usagef("--upstream %s: it takes an address such as http://127.0.0.1:11434", f.upstream)
	}
	port, err := strconv.Atoi(to.Port())
	ip := net.ParseIP(to.Hostname())
	if err != nil || ip == nil || !ip.IsLoopback() {
		return nil, usagef("--upstream %s: it takes a port of this machine by its loopback address, such as http://127.0.0.1:11434", f.upstream)
	}
	u := &upstream{address: to.Host, front: p, since: time.Now().UTC().Truncate(time.Second)}
	if err := u.oneTenant(); err != nil {
		return nil, err
	}
	p.tenants, p.config.Tenants = nil, nil
	program, a, err := beacon.Find(port)
	if err != nil {
		return nil, fmt.Errorf("%s is not known to be shielded: %w; start it with kvshield run -- PROGRAM", f.upstream, err)
	}
	u.program = program
	u.last.Store(&a)
	return u, nil
}

// oneTenant: an engine that somebody else started cannot be told how to keep tenants apart.
func (u *upstream) oneTenant() error {
	if u.front.tenants != nil && u.front.config.Keys.Tenants() > 1 {
		return errors.New("the keys of several tenants cannot be kept apart in an engine that kvshield serve did not start; have it start llama-server with -m, give one name to all keys, or let keys share with --share-prefix")
	}
	return nil
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
	s := status{Health: health{Ready: err == nil, Starts: 1}, Keys: u.front.keys(), Since: u.since}
	if err != nil {
		s.Health.Reason = err.Error()
		a = *u.last.Load()
	}
	s.Mode = a.Mode
	s.Enclave = &enclaveStatus{Backend: a.Backend, Hardware: a.Hardware, Statement: a.Statement}
	s.Transitions = &transitions{Count: a.Transitions, Bytes: a.Bytes, Shielded: a.Shielded, Refused: a.Refused, Fatal: a.Ended}
	return s
}
