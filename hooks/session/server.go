package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Peer is one engine process that has connected.
type Peer struct {
	PID  int // as the kernel tells it
	conn *net.UnixConn
	send sync.Mutex
}

// Handler is what the supervisor does for engine processes. Its methods are called for one peer in sequence,
// for several peers at once.
type Handler interface {
	// Hello returns the way to the enclave. The file is sent to the peer and then closed.
	Hello(ctx context.Context, p *Peer, h Hello) (Welcome, *os.File, error)
	// Open is asked before a process opens a model. The file is the process's own, opened for reading; it is
	// closed by the caller. The file returned, if any, is sent to the peer and then closed. An error is a refusal.
	Open(ctx context.Context, p *Peer, path string, model *os.File) (Opened, *os.File, error)
	// Fatal passes on why the hook is about to end its process.
	Fatal(p *Peer, message string)
	// Gone is called once when a peer that said hello is gone.
	Gone(p *Peer)
}

// Server is the supervisor's end of the session socket.
type Server struct {
	Path     string
	listener *net.UnixListener
	handler  Handler
	uid      uint32
	wg       sync.WaitGroup
	mu       sync.Mutex
	peers    map[*Peer]struct{}
}

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
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("session socket: %w", err)
		}
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			defer conn.Close()
			s.attend(ctx, conn)
		}()
	}
}

// Stop tells every engine process to end, and why.
func (s *Server) Stop(reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.peers {
		_ = p.write(text(typeStop, reason), nil) // a peer that cannot be told is gone already
	}
}

// Close stops listening, removes the socket and hangs up on every peer, which ends their processes.
func (s *Server) Close() error {
	err := s.listener.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.peers {
		p.conn.Close()
	}
	return err
}

func (s *Server) track(p *Peer, present bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if present {
		s.peers[p] = struct{}{}
	} else {
		delete(s.peers, p)
	}
}

func (s *Server) attend(ctx context.Context, conn *net.UnixConn) {
	pid, err := s.credentials(conn)
	p := &Peer{PID: pid, conn: conn}
	if err != nil {
		_ = p.write(text(typeRefused, err.Error()), nil)
		return
	}
	if err := s.hello(ctx, p); err != nil {
		_ = p.write(text(typeRefused, err.Error()), nil)
		return
	}
	s.track(p, true)
	defer s.handler.Gone(p)
	defer s.track(p, false)
	for {
		if err := s.next(ctx, p); err != nil {
			return
		}
	}
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

func (s *Server) hello(ctx context.Context, p *Peer) error {
	t, body, f, err := p.read()
	if err != nil {
		return err
	}
	if f != nil {
		f.Close()
	}
	if t != typeHello {
		return malformed("type %d before hello", t)
	}
	h, err := decodeHello(body)
	if err != nil {
		return err
	}
	w, file, err := s.handler.Hello(ctx, p, h)
	if err != nil {
		return err
	}
	defer file.Close()
	return p.write(w.encode(), file)
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
		s.handler.Fatal(p, string(body))
		return nil
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
		return p.write(text(typeRefused, err.Error()), nil)
	}
	b, err := answer.encode()
	if err != nil {
		return p.write(text(typeRefused, err.Error()), nil)
	}
	return p.write(b, file)
}

func (p *Peer) write(b []byte, file *os.File) error {
	p.send.Lock()
	defer p.send.Unlock()
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	_, _, err := p.conn.WriteMsgUnix(b, rights, nil)
	return err
}

func (p *Peer) read() (Type, []byte, *os.File, error) {
	buf := make([]byte, headerSize+bodyMax)
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := p.conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return 0, nil, nil, err
	}
	file := firstFile(oob[:oobn])
	if n == 0 {
		return 0, nil, file, io.EOF
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = malformed("longer than %d bytes", len(buf))
	} else {
		var t Type
		var body []byte
		if t, body, err = decode(buf[:n]); err == nil {
			return t, body, file, nil
		}
	}
	if file != nil {
		file.Close()
	}
	return 0, nil, nil, err
}

// firstFile takes the first descriptor and closes any other: a peer must not fill our table.
func firstFile(oob []byte) *os.File {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var first *os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			if first == nil {
				first = os.NewFile(uintptr(fd), "model")
			} else {
				unix.Close(fd)
			}
		}
	}
	return first
}
