package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/internal/forker"
	"github.com/kvshield/kvshield/plugin/pb"
)

const (
	startWithin = 20 * time.Second
	closeWithin = 3 * time.Second
	pingEvery   = 2 * time.Second
	pingWithin  = 10 * time.Second
)

// Options say how to start an enclave process.
type Options struct {
	Program   string    // the enclave's executable
	Args      []string  // its arguments
	SocketDir string    // directory for its sockets, closed to other users
	Stderr    io.Writer // receives what the enclave prints; nil discards it

	// PingEvery is how often the enclave is asked whether it lives, zero: 2 s; PingWithin how soon it must answer,
	// zero: 10 s.
	PingEvery, PingWithin time.Duration
}

// Client is the host's end of a running enclave process.
type Client struct {
	pid     int
	process *goplugin.Client
	rpc     pb.EnclaveClient
	done    chan struct{}

	pingEvery, pingWithin time.Duration
}

// Start starts an enclave process and waits until it answers.
func Start(o Options) (*Client, error) {
	if err := explain(o.Program); err != nil {
		return nil, err
	}
	cmd := exec.Command(o.Program, o.Args...)
	cmd.Env = []string{goplugin.EnvUnixSocketDir + "=" + o.SocketDir} // go-plugin adds the host's own
	last := &lastLine{next: o.Stderr}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	process := goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig:  handshake,
		Plugins:          goplugin.PluginSet{pluginName: &grpcPlugin{}},
		Cmd:              cmd,
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		AutoMTLS:         true,
		StartTimeout:     startWithin,
		Stderr:           last,
		Logger:           hclog.NewNullLogger(),
	})
	c, err := connect(process, o)
	if err != nil {
		process.Kill()
		return nil, startError(o.Program, last.text(), err)
	}
	return c, nil
}

// startError prefers the enclave's own last line to go-plugin's page of guesses.
func startError(program, line string, err error) error {
	if line == "" {
		line, _, _ = strings.Cut(err.Error(), "\n")
	}
	return &StartError{Program: program, Line: line, Detail: err}
}

// StartError is an enclave program that was started and did not become an enclave.
type StartError struct {
	Program string
	Line    string // what it said last, else what go-plugin says
	Detail  error  // go-plugin's account
}

func (e *StartError) Error() string {
	return fmt.Sprintf("the enclave program %s did not start: %s", e.Program, e.Line)
}

func (e *StartError) Unwrap() error { return e.Detail }

// lastLine remembers the last line written to it.
type lastLine struct {
	mu   sync.Mutex
	line string
	next io.Writer
}

func (l *lastLine) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if text := strings.TrimSpace(string(p)); text != "" {
		l.line = text[strings.LastIndexByte(text, '\n')+1:]
	}
	if l.next != nil {
		return l.next.Write(p)
	}
	return len(p), nil
}

func (l *lastLine) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.line
}

func connect(process *goplugin.Client, o Options) (*Client, error) {
	var protocol goplugin.ClientProtocol
	var err error
	forker.Do(func() { protocol, err = process.Client() })
	if err != nil {
		return nil, err
	}
	rpc, err := protocol.Dispense(pluginName)
	if err != nil {
		return nil, err
	}
	pid, err := strconv.Atoi(process.ID())
	if err != nil {
		return nil, fmt.Errorf("its process number %q is no number", process.ID())
	}
	c := &Client{pid: pid, process: process, rpc: rpc.(pb.EnclaveClient), done: make(chan struct{}),
		pingEvery: cmp.Or(o.PingEvery, pingEvery), pingWithin: cmp.Or(o.PingWithin, pingWithin)}
	go c.watch(protocol)
	return c, nil
}

// explain says why a program will not start, before go-plugin says only that it did not.
func explain(program string) error {
	info, err := os.Stat(program)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("the enclave program %s is missing; build it with `make build`, or name it with --enclave", program)
	case err != nil:
		return fmt.Errorf("the enclave program: %w", err)
	case info.IsDir() || info.Mode()&0o111 == 0:
		return fmt.Errorf("the enclave program %s is not executable (mode %v); build it with `make build`", program, info.Mode())
	}
	return nil
}

// StartWithBackoff starts an enclave, trying again with growing pauses until ctx ends or the tries are used up.
// Failed is told of every failure that is followed by another try.
func StartWithBackoff(ctx context.Context, o Options, failed func(err error, next time.Duration)) (*Client, error) {
	b := backoff.NewExponentialBackOff(backoff.WithInitialInterval(100*time.Millisecond), backoff.WithMaxInterval(5*time.Second),
		backoff.WithMaxElapsedTime(time.Minute))
	return backoff.RetryNotifyWithData(func() (*Client, error) { return Start(o) }, backoff.WithContext(b, ctx), failed)
}

// watch closes done when the process has ended or no longer answers.
func (c *Client) watch(protocol goplugin.ClientProtocol) {
	defer close(c.done)
	exited := make(chan struct{})
	go func() { waitPID(c.pid); close(exited) }()
	tick := time.NewTicker(c.pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-exited:
			c.process.Kill()
			return
		case <-tick.C:
			if !c.ping(protocol, exited) {
				_ = unix.Kill(c.pid, unix.SIGKILL) // frozen: it cannot end itself
				c.process.Kill()
				<-exited
				return
			}
		}
	}
}

func (c *Client) ping(protocol goplugin.ClientProtocol, exited <-chan struct{}) bool {
	answer := make(chan error, 1)
	go func() { answer <- protocol.Ping() }()
	select {
	case err := <-answer:
		return err == nil
	case <-exited:
		return true // the caller sees the exit
	case <-time.After(c.pingWithin):
		return false
	}
}

// waitPID returns when the process has ended, whoever reaps it.
func waitPID(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if n > 0 || (err != nil && err != unix.EINTR) {
			return
		}
	}
}

// PID of the enclave process.
func (c *Client) PID() int { return c.pid }

// Done is closed when the enclave is gone.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the enclave process and waits for it. Its keys go with it.
func (c *Client) Close() {
	// go-plugin asks politely, without end: a frozen enclave is not going to hear it.
	impatient := time.AfterFunc(closeWithin, func() { _ = unix.Kill(c.pid, unix.SIGKILL) })
	c.process.Kill()
	impatient.Stop()
	<-c.done
}

// Attest implements enclave.Attester.
func (c *Client) Attest(ctx context.Context, nonce []byte) (enclave.Report, error) {
	r, err := c.rpc.Attest(ctx, &pb.AttestRequest{Nonce: nonce})
	return enclave.Report{Backend: r.GetBackend(), Hardware: r.GetHardware(), Statement: r.GetStatement(),
		Evidence: r.GetEvidence(), Hardening: r.GetHardening(), Missing: r.GetMissing()}, fromStatus(err)
}

// Inspect implements enclave.Loader.
func (c *Client) Inspect(ctx context.Context, sources []string) (enclave.Model, error) {
	m, err := c.rpc.Inspect(ctx, &pb.InspectRequest{Sources: sources})
	return modelFromWire(m), fromStatus(err)
}

// Load implements enclave.Loader.
func (c *Client) Load(ctx context.Context, req enclave.LoadRequest) (enclave.LoadResult, error) {
	r, err := c.rpc.Load(ctx, &pb.LoadRequest{Sources: req.Sources, Outputs: req.Outputs})
	if err != nil {
		return enclave.LoadResult{}, fromStatus(err)
	}
	res := enclave.LoadResult{ID: enclave.ModelID(r.GetId()), Model: modelFromWire(r.GetModel()), Fingerprint: r.GetFingerprint(), Marker: r.GetMarker(), Pairs: narrow(r.GetPairs()), FixedHeads: r.GetFixedHeads()}
	for _, x := range r.GetCopies() {
		res.Copies = append(res.Copies, enclave.Copy{File: int(x.GetFile()), From: int64(x.GetFrom()), To: int64(x.GetTo()), Length: int64(x.GetLength())})
	}
	for _, n := range r.GetOutputSizes() {
		res.OutputSizes = append(res.OutputSizes, int64(n))
	}
	return res, nil
}

// Unload implements enclave.Loader.
func (c *Client) Unload(ctx context.Context, id enclave.ModelID) error {
	_, err := c.rpc.Unload(ctx, &pb.UnloadRequest{Id: uint32(id)})
	return fromStatus(err)
}

// Plane is a data plane inside the enclave, made for one engine process.
type Plane struct {
	ID      uint32
	Address string // with the socket transport: where to connect
	Token   []byte // with the socket transport: what to send first
}

// AttachShared makes a data plane of a shared-memory region, which the enclave opens by path.
func (c *Client) AttachShared(ctx context.Context, path string, spin time.Duration) (Plane, error) {
	r, err := c.rpc.Attach(ctx, &pb.AttachRequest{Transport: &pb.AttachRequest_SharedMemory{SharedMemory: path}, SpinNanoseconds: uint64(spin)})
	return Plane{ID: r.GetPlane()}, fromStatus(err)
}

// AttachSocket makes a data plane on a socket. Capacity is the most payload bytes of one frame.
func (c *Client) AttachSocket(ctx context.Context, capacity uint32) (Plane, error) {
	r, err := c.rpc.Attach(ctx, &pb.AttachRequest{Transport: &pb.AttachRequest_SocketCapacity{SocketCapacity: capacity}})
	return Plane{r.GetPlane(), r.GetAddress(), r.GetToken()}, fromStatus(err)
}

// Grant lets a data plane use a model.
func (c *Client) Grant(ctx context.Context, plane uint32, id enclave.ModelID) error {
	_, err := c.rpc.Grant(ctx, &pb.GrantRequest{Plane: plane, Model: uint32(id)})
	return fromStatus(err)
}

// Detach ends a data plane.
func (c *Client) Detach(ctx context.Context, plane uint32) error {
	_, err := c.rpc.Detach(ctx, &pb.DetachRequest{Plane: plane})
	return fromStatus(err)
}

var (
	_ enclave.Loader   = (*Client)(nil)
	_ enclave.Attester = (*Client)(nil)
)

// narrow takes what does not fit for what no rotary pair is.
func narrow(list []uint32) (out []uint16) {
	for _, v := range list {
		out = append(out, uint16(min(v, math.MaxUint16)))
	}
	return out
}
