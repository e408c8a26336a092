package plugin

import (
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/dataplane"
	"github.com/kvshield/kvshield/plugin/pb"
)

const (
	tokenSize     = 32
	connectWithin = 10 * time.Second
	maxCapacity   = 1 << 30
)

// planes are the data planes of one enclave process, one for each engine process.
type planes struct {
	impl      Implementation
	socketDir string
	mu        sync.Mutex
	last      uint32
	open      map[uint32]*plane
}

// plane is one engine's way in. It reaches only the models that this engine has opened.
type plane struct {
	inverter enclave.Inverter
	target   dataplane.Target
	granted  atomic.Pointer[map[enclave.ModelID]struct{}]
	stop     func()
}

func newPlanes(impl Implementation, socketDir string) *planes {
	return &planes{impl: impl, socketDir: socketDir, open: map[uint32]*plane{}}
}

// Invert implements enclave.Inverter for the models granted to this plane.
func (p *plane) Invert(id enclave.ModelID, layer int, dst, src []float32) error {
	if _, ok := (*p.granted.Load())[id]; !ok {
		return enclave.ErrUnknownModel
	}
	return p.inverter.Invert(id, layer, dst, src)
}

// update replaces the set of granted models; the hot path reads it without a lock.
func (p *plane) update(change func(map[enclave.ModelID]struct{})) {
	next := map[enclave.ModelID]struct{}{}
	for id := range *p.granted.Load() {
		next[id] = struct{}{}
	}
	change(next)
	p.granted.Store(&next)
}

func (s *planes) add(stop func(), p *plane) uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	p.stop = stop
	s.open[s.last] = p
	return s.last
}

func (s *planes) newPlane() *plane {
	p := &plane{inverter: s.impl.Inverter}
	p.granted.Store(&map[enclave.ModelID]struct{}{})
	if s.impl.Inverter != nil {
		p.target.Inverter = p
	}
	if s.impl.Keeper != nil {
		p.target.Store = s.impl.Keeper.OpenStore(p.models)
	}
	return p
}

func (p *plane) models() []enclave.ModelID { return slices.Collect(maps.Keys(*p.granted.Load())) }

// end wipes what the plane's engine kept in the enclave.
func (p *plane) end() {
	if p.target.Store != nil {
		p.target.Store.Close()
	}
}

func (s *planes) attachShared(path string, spin time.Duration) (*pb.AttachReply, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("the enclave cannot open the data plane: %w", err)
	}
	defer f.Close()
	region, err := dataplane.Map(f)
	if err != nil {
		return nil, err
	}
	p := s.newPlane()
	go func() {
		defer region.Close()
		defer p.end()
		region.Serve(&p.target, spin)
	}()
	return &pb.AttachReply{Plane: s.add(region.Stop, p)}, nil
}

// attachSocket listens for one connection that begins with the token, and serves it.
func (s *planes) attachSocket(capacity uint32) (*pb.AttachReply, error) {
	if capacity == 0 || capacity > maxCapacity || capacity%4 != 0 {
		return nil, fmt.Errorf("data plane of %d bytes", capacity)
	}
	token := make([]byte, tokenSize)
	rand.Read(token) // never fails: crypto/rand ends the program instead
	path := filepath.Join(s.socketDir, fmt.Sprintf("data-%x.sock", token[:6]))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("the enclave cannot make a data-plane socket: %w", err)
	}
	p := s.newPlane()
	w := &way{closers: []io.Closer{l}}
	id := s.add(w.close, p)
	go func() {
		defer p.end()
		defer w.close() // removes the socket's file
		_ = l.SetDeadline(time.Now().Add(connectWithin))
		c, err := l.AcceptUnix()
		if err != nil || !w.add(c) {
			return
		}
		l.Close()
		if sentToken(c, token) {
			_ = dataplane.ServeSocket(c, &p.target, capacity) // the engine's end reports a broken stream
		}
	}()
	return &pb.AttachReply{Plane: id, Address: path, Token: token}, nil
}

// way is what has to be closed to end a plane on a socket.
type way struct {
	mu      sync.Mutex
	closed  bool
	closers []io.Closer
}

// add is false, and c closed, when the plane has ended meanwhile.
func (w *way) add(c io.Closer) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		c.Close()
		return false
	}
	w.closers = append(w.closers, c)
	return true
}

func (w *way) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	for _, c := range w.closers {
		c.Close()
	}
}

func sentToken(c *net.UnixConn, token []byte) bool {
	got := make([]byte, len(token))
	_ = c.SetReadDeadline(time.Now().Add(connectWithin))
	if _, err := io.ReadFull(c, got); err != nil {
		return false
	}
	_ = c.SetReadDeadline(time.Time{})
	return subtle.ConstantTimeCompare(got, token) == 1
}

func (s *planes) find(id uint32) (*plane, error) {
	p, ok := s.open[id]
	if !ok {
		return nil, fmt.Errorf("no data plane %d", id)
	}
	return p, nil
}

func (s *planes) grant(id uint32, model enclave.ModelID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.find(id)
	if err == nil {
		p.update(func(m map[enclave.ModelID]struct{}) { m[model] = struct{}{} })
	}
	return err
}

func (s *planes) revoke(model enclave.ModelID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.open {
		p.update(func(m map[enclave.ModelID]struct{}) { delete(m, model) })
	}
}

func (s *planes) detach(id uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.find(id)
	if err == nil {
		delete(s.open, id)
		p.stop()
	}
	return err
}
