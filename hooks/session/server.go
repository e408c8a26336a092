package session

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Handler is what the supervisor does for engine processes. Its methods are called for one peer in sequence,
// for several peers at once.
type Handler interface {
	// Hello returns the way to the enclave. The file, if any, is sent to the peer and then closed.
	Hello(ctx context.Context, p *Peer, h Hello) (Welcome, *os.File, error)
	// Open is asked before a process opens a model. The file is the process's own, opened for reading; it is
	// closed by the caller. The file returned, if any, is sent to the peer and then closed. An error is a refusal.
	Open(ctx context.Context, p *Peer, path string, model *os.File) (Opened, *os.File, error)
	// Fatal passes on why the hook is about to end its process.
	Fatal(p *Peer, message string)
	// Gone is called once for every peer whose Hello was granted, when it is gone.
	Gone(p *Peer)
}

// Metered is a Handler that has a hook count into a meter's memory. The file is sent to the peer after its welcome, and then
// closed; nil: the hook counts nothing.
type Metered interface {
	Meter(p *Peer) *os.File
}

// Server is the supervisor's end of the session socket.
type Server struct {
	Path     string
	listener *net.UnixListener
	handler  Handler
	uid      uint32
	wg       sync.WaitGroup
	mu       sync.Mutex
	peers    map[*Peer]struct{} // all that are connected, from before their hello
	closed   bool
}

const (
	// maxPeers at once: each costs the enclave a thread, and its memory.
	maxPeers    = 256
	helloWithin = 10 * time.Second
	acceptPause = 50 * time.Millisecond
)

// Listen makes the socket at path. Its directory must be closed to other users.
func Listen(path string, h Handler) (*Server, error) {
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("cannot make the session socket: %w", err)
	}
	return &Server{Path: path, listener: l, handler: h, uid: uint32(os.Getuid()), peers: map[*Peer]struct{}{}}, nil
}

// Serve accepts hooks until Close, and returns when the last one is gone.
func (s *Server) Serve(ctx context.Context) error {
	defer s.wg.Wait()
	for {
		conn, err := s.listener.AcceptUnix()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case transient(err):
			time.Sleep(acceptPause)
		case err != nil:
			return fmt.Errorf("session socket: %w", err)
		default:
			s.wg.Go(func() {
				defer conn.Close()
				s.receive(ctx, &Peer{conn: conn})
			})
		}
	}
}

// transient says whether a later accept may succeed: the machine was short of something.
func transient(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Stop tells engine processes to end, and why.
func Stop(reason string, peers ...*Peer) {
	var told sync.WaitGroup
	for _, p := range peers {
		// Each on its own: one that takes no messages must not keep the others from being told.
		told.Go(func() { _ = p.write(text(typeStop, reason), nil) })
	}
	told.Wait()
}

// Close stops listening, removes the socket and hangs up on every peer, which ends their processes.
func (s *Server) Close() error {
	err := s.listener.Close()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	for _, p := range s.connected() {
		p.conn.Close()
	}
	return err
}

func (s *Server) connected() []*Peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.peers))
}

func (s *Server) admit(p *Peer) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return errors.New("this kvshield is ending")
	case len(s.peers) >= maxPeers:
		return fmt.Errorf("%d engine processes are connected, and this kvshield serves no more at once", len(s.peers))
	}
	s.peers[p] = struct{}{}
	return nil
}

func (s *Server) leave(p *Peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.peers, p)
}

func (s *Server) receive(ctx context.Context, p *Peer) {
	err := s.admit(p)
	if err == nil {
		defer s.leave(p)
		p.PID, err = s.credentials(p.conn)
	}
	if err == nil {
		err = s.attend(ctx, p)
	}
	if err != nil {
		p.refuse(err) // it may be gone already
	}
}

// attend serves a peer. It returns an error where the hello came to nothing.
func (s *Server) attend(ctx context.Context, p *Peer) error {
	welcome, file, err := s.hello(ctx, p)
	if err != nil {
		return err
	}
	defer s.handler.Gone(p)
	defer p.dumps.end()
	err = p.write(welcome.encode(), file)
	if file != nil {
		file.Close()
	}
	if m, ok := s.handler.(Metered); ok && err == nil {
		err = p.meter(m.Meter(p))
	}
	for err == nil {
		err = s.next(ctx, p)
	}
	return nil
}

// credentials lets in processes of the same user only: the directory's mode says so too, but a socket can be
// handed on.
func (s *Server) credentials(conn *net.UnixConn) (pid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
		return 0, e
	}
	if err != nil {
		return 0, err
	}
	if cred.Uid != s.uid {
		return 0, fmt.Errorf("this kvshield belongs to user %d and serves no engine of user %d", s.uid, cred.Uid)
	}
	return int(cred.Pid), nil
}

func (s *Server) hello(ctx context.Context, p *Peer) (Welcome, *os.File, error) {
	_ = p.conn.SetReadDeadline(time.Now().Add(helloWithin))
	t, body, f, err := p.read()
	if err != nil {
		return Welcome{}, nil, err
	}
	_ = p.conn.SetReadDeadline(time.Time{})
	if f != nil {
		f.Close()
	}
	if t != typeHello {
		return Welcome{}, nil, malformed("type %d before hello", t)
	}
	h, err := decodeHello(body)
	if err != nil {
		return Welcome{}, nil, err
	}
	return s.handler.Hello(ctx, p, h)
}

func (s *Server) next(ctx context.Context, p *Peer) error {
	t, body, f, err := p.read()
	if err != nil {
		return err
	}
	if f != nil {
		defer f.Close()
	}
	switch t {
	case typeOpen:
		return s.open(ctx, p, body, f)
	case typeFatal:
		if p.ended {
			return malformed("two last words")
		}
		p.ended = true
		s.handler.Fatal(p, string(body))
		return nil
	case typeDumped:
		return p.dumps.answer(body)
	}
	return malformed("type %d from a hook", t)
}

func (s *Server) open(ctx context.Context, p *Peer, body []byte, model *os.File) error {
	path, err := decodeOpen(body)
	if err != nil {
		return err
	}
	if model == nil {
		return malformed("a model without its file descriptor")
	}
	answer, file, err := s.handler.Open(ctx, p, path, model)
	if file != nil {
		defer file.Close()
	}
	if err != nil {
		return p.refuse(err)
	}
	b, err := answer.encode()
	if err != nil {
		return p.refuse(err)
	}
	return p.write(b, file)
}
