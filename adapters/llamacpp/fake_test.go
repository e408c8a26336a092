package llamacpp_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/dataplane"
	"github.com/kvshield/kvshield/hooks/frame"
	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/hooks/session"
)

// responder is the other end of the data plane: the bytes of a reply, or nil for none at all.
type responder func(request frame.Header, rows []byte) []byte

// fake stands in for the supervisor and its enclave.
type fake struct {
	server    *session.Server
	transport session.Transport
	capacity  uint32
	timeout   time.Duration
	respond   responder        // answers instead of the inverter where it is set
	inverter  enclave.Inverter // nil: the identity
	keeper    enclave.Keeper   // mode resident where it is set
	refuse    string           // reason for which every model is refused
	noHello   string           // reason for which every hello is refused
	opened    session.Opened
	dumps     bool                // allowed by the welcome
	observe   bool                // nothing is shielded
	onOpen    func(*session.Peer) // called when a model is opened, for a request of the test's own

	mu      sync.Mutex
	opens   []string
	fatal   []string
	meters  map[*session.Peer]*meter.Meter
	graphs  []meter.Graph // of engines that are gone
	totals  meter.Totals
	ends    map[*session.Peer]func()
	greeted chan struct{}
	gone    chan struct{}
}

// start opens a session socket for the hooks of a test.
func start(t *testing.T, change func(*fake)) *fake {
	t.Helper()
	f := &fake{transport: session.SharedMemory, capacity: dataplane.DefaultCapacity, timeout: patience, opened: built.opened,
		ends: map[*session.Peer]func(){}, greeted: make(chan struct{}, 64), gone: make(chan struct{}, 64)}
	if change != nil {
		change(f)
	}
	dir, err := os.MkdirTemp("", "kvs")
	if err != nil {
		t.Fatal(err)
	}
	if f.server, err = session.Listen(filepath.Join(dir, "s.sock"), f); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- f.server.Serve(context.Background()) }()
	t.Cleanup(func() {
		f.server.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		os.RemoveAll(dir)
	})
	return f
}

func (f *fake) socket() string { return f.server.Path }

// Invert is the identity: it is what undoes the permutation of built.shielded.
func (f *fake) Invert(_ enclave.ModelID, _ int, dst, src []float32) error {
	copy(dst, src)
	return nil
}

func (f *fake) Hello(_ context.Context, p *session.Peer, _ session.Hello) (session.Welcome, *os.File, error) {
	if f.noHello != "" {
		return session.Welcome{}, nil, errors.New(f.noHello)
	}
	if f.observe {
		f.greeted <- struct{}{}
		return session.Welcome{Observe: true, Dumps: f.dumps}, nil, nil
	}
	if f.inverter == nil {
		f.inverter = f
	}
	attach := f.attachShared
	if f.transport == session.Socket {
		attach = f.attachSocket
	}
	file, end, err := attach()
	f.mu.Lock()
	f.ends[p] = end
	f.mu.Unlock()
	f.greeted <- struct{}{}
	return session.Welcome{Transport: f.transport, Capacity: f.capacity, SpinMicro: 20, TimeoutMS: uint32(f.timeout.Milliseconds()),
		Dumps: f.dumps, Resident: f.keeper != nil, Scrub: f.keeper != nil}, file, err
}

func (f *fake) attachShared() (*os.File, func(), error) {
	file, err := dataplane.Create(f.capacity)
	if err != nil {
		return nil, nil, err
	}
	region, err := dataplane.Map(file)
	if err != nil {
		return nil, nil, err
	}
	served, stop := make(chan struct{}), region.Stop
	if f.respond == nil {
		target := f.target()
		go func() {
			defer close(served)
			region.Serve(target, 0)
			if target.Store != nil {
				target.Store.Close()
			}
		}()
	} else {
		raw, err := unix.Mmap(int(file.Fd()), 0, int(dataplane.Size(f.capacity)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, nil, err
		}
		var ended atomic.Bool
		stop = func() { ended.Store(true) }
		go func() { defer close(served); f.serveRaw(raw, &ended); _ = unix.Munmap(raw) }()
	}
	return file, func() {
		stop()
		<-served
		region.Close()
	}, nil
}

func (f *fake) target() *dataplane.Target {
	if f.keeper == nil {
		return &dataplane.Target{Inverter: f.inverter}
	}
	return &dataplane.Target{Store: f.keeper.OpenStore(func() []enclave.ModelID { return []enclave.ModelID{1} })}
}

// serveRaw answers in shared memory as docs/protocol.md lays it out, whatever the responder says.
func (f *fake) serveRaw(memory []byte, ended *atomic.Bool) {
	const page, request, reply = 4096, 64, 128
	word := func(at int) *uint32 { return (*uint32)(unsafe.Pointer(&memory[at])) }
	seen := uint32(0)
	for ; !ended.Load(); time.Sleep(time.Millisecond) {
		if atomic.LoadUint32(word(request)) == seen {
			continue
		}
		seen++
		h, err := frame.Decode(memory[page:], f.capacity)
		if err != nil {
			return
		}
		answer := f.respond(h, memory[page+frame.HeaderSize:][:h.Payload])
		if answer == nil {
			continue
		}
		copy(memory[2*page+int(f.capacity):], answer)
		atomic.AddUint32(word(reply), 1)
		_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(word(reply))), 1, 1, 0, 0, 0)
	}
}

func (f *fake) attachSocket() (*os.File, func(), error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	own := os.NewFile(uintptr(fds[0]), "enclave's end")
	defer own.Close()
	conn, err := net.FileConn(own)
	if err != nil {
		return nil, nil, err
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		if f.respond == nil {
			_ = dataplane.ServeSocket(conn, &dataplane.Target{Inverter: f.inverter}, f.capacity)
			return
		}
		f.serveRawSocket(conn)
	}()
	return os.NewFile(uintptr(fds[1]), "engine's end"), func() { conn.Close(); <-served }, nil
}

func (f *fake) serveRawSocket(conn net.Conn) {
	b := make([]byte, frame.HeaderSize+int(f.capacity))
	for {
		if _, err := io.ReadFull(conn, b[:frame.HeaderSize]); err != nil {
			return
		}
		h, err := frame.Decode(b, f.capacity)
		if err != nil {
			return
		}
		rows := b[frame.HeaderSize:][:h.Payload]
		if _, err := io.ReadFull(conn, rows); err != nil {
			return
		}
		if answer := f.respond(h, rows); answer != nil {
			_, _ = conn.Write(answer) // the hook may have ended its process
		}
	}
}

func (f *fake) Open(_ context.Context, p *session.Peer, path string, _ *os.File) (session.Opened, *os.File, error) {
	f.mu.Lock()
	f.opens = append(f.opens, path)
	f.mu.Unlock()
	if f.onOpen != nil {
		f.onOpen(p)
	}
	if f.refuse != "" {
		return session.Opened{}, nil, errors.New(f.refuse)
	}
	if f.keeper != nil {
		return session.Opened{Reside: true, Model: 1}, nil, nil
	}
	if !f.opened.Shield {
		return session.Opened{}, nil, nil
	}
	file, err := os.Open(built.shielded)
	return f.opened, file, err
}

func (f *fake) Fatal(_ *session.Peer, message string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fatal = append(f.fatal, message)
}

func (f *fake) Gone(p *session.Peer) {
	f.mu.Lock()
	end := f.ends[p]
	delete(f.ends, p)
	if m := f.meters[p]; m != nil {
		f.graphs = append(f.graphs, m.Graphs()...)
		f.totals.Add(m.Totals())
		m.Close()
	}
	f.mu.Unlock()
	if end != nil {
		end()
	}
	f.gone <- struct{}{}
}

// Meter implements session.Metered.
func (f *fake) Meter(p *session.Peer) *os.File {
	file, err := meter.Create()
	if err != nil {
		panic(err)
	}
	m, err := meter.Map(file)
	if err != nil {
		panic(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.meters == nil {
		f.meters = map[*session.Peer]*meter.Meter{}
	}
	f.meters[p] = m
	return file
}

// waitGone returns when a hook that said hello is gone, its last words included.
func (f *fake) waitGone(t *testing.T) {
	t.Helper()
	select {
	case <-f.gone:
	case <-time.After(patience):
		t.Fatal("the engine's connection was not closed")
	}
}

// expectFatal waits for the end of the engine and compares its last words.
func (f *fake) expectFatal(t *testing.T, want ...string) {
	t.Helper()
	f.waitGone(t)
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.fatal) != len(want) || len(want) == 1 && f.fatal[0] != want[0] {
		t.Errorf("last words %q, want %q", f.fatal, want)
	}
}

func (f *fake) asked() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.opens...)
}

// reply is a whole reply to a request, before and after it is spoiled.
func reply(h frame.Header, rows []byte, spoil func(*frame.Header)) []byte {
	h.Type = frame.Reply
	spoil(&h)
	b := make([]byte, frame.HeaderSize)
	h.Encode(b)
	if h.Type == frame.Error {
		return b
	}
	return append(b, rows...)
}

// patch overwrites four bytes of an encoded frame.
func patch(b []byte, at int, value uint32) []byte {
	binary.LittleEndian.PutUint32(b[at:], value)
	return b
}
