package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

const patience = 20 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake answers every hello with a file of its own, refuses paths that begin with "bad" and passes the rest.
type fake struct {
	mu    sync.Mutex
	fatal []string
	gone  chan int
	hello error
}

func (f *fake) Hello(context.Context, *Peer, Hello) (Welcome, *os.File, error) {
	if f.hello != nil {
		return Welcome{}, nil, f.hello
	}
	file, err := os.Open(os.DevNull)
	return Welcome{SharedMemory, 4096, 1, 2, false, false, false, false}, file, err
}

func (f *fake) Open(_ context.Context, _ *Peer, path string, model *os.File) (Opened, *os.File, error) {
	if strings.HasPrefix(path, "bad") {
		return Opened{}, nil, errors.New("will not have " + path)
	}
	if strings.HasPrefix(path, "long") {
		return Opened{Marker: strings.Repeat("m", 100)}, nil, nil
	}
	if _, err := model.Stat(); err != nil {
		return Opened{}, nil, err
	}
	file, err := os.Open(os.DevNull)
	return Opened{Shield: true, Model: 3, Layers: 1, RowFloats: 4, Marker: "m", Fingerprint: []byte("f")}, file, err
}

func (f *fake) Fatal(_ *Peer, message string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fatal = append(f.fatal, message)
}

func (f *fake) Gone(p *Peer) { f.gone <- p.PID }

func (f *fake) lastWords() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.fatal...)
}

func serve(t *testing.T, f *fake) *Server {
	t.Helper()
	f.gone = make(chan int, 2*maxPeers)
	s, err := Listen(filepath.Join(t.TempDir(), "s.sock"), f)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background()) }()
	t.Cleanup(func() {
		s.Close()
		within(t, "Serve to return", func() {
			if err := <-served; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	})
	return s
}

func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("waited %v for %s", patience, what)
	}
}

// hook is the C end as far as these tests need it.
type hook struct {
	t *testing.T
	*Peer
}

func dial(t *testing.T, s *Server) hook {
	t.Helper()
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: s.Path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return hook{t, &Peer{conn: conn}}
}

func greet(t *testing.T, s *Server) hook {
	t.Helper()
	h := dial(t, s)
	h.say(Hello{PID: 1, Version: "0.27"}.encode())
	h.expect(typeWelcome, "", true)
	return h
}

func (h hook) say(b []byte, files ...*os.File) {
	h.t.Helper()
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	var rights []byte
	if fds != nil {
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := h.conn.WriteMsgUnix(b, rights, nil); err != nil {
		h.t.Fatal(err)
	}
}

// expect reads one message; text, where given, must be in its body.
func (h hook) expect(want Type, text string, withFile bool) {
	h.t.Helper()
	kind, body, f, err := h.read()
	if err != nil {
		h.t.Fatalf("waiting for message %d: %v", want, err)
	}
	if f != nil {
		f.Close()
	}
	if kind != want || !strings.Contains(string(body), text) || (f != nil) != withFile {
		h.t.Fatalf("message %d %q, file %v; want %d with %q, file %v", kind, body, f != nil, want, text, withFile)
	}
}

func (h hook) expectEnd() {
	h.t.Helper()
	if kind, body, _, err := h.read(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		h.t.Fatalf("the connection goes on (message %d %q, %v)", kind, body, err)
	}
}

func null(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestConversation(t *testing.T) {
	f := &fake{}
	h := greet(t, serve(t, f))
	h.say(raw(typeOpen, "good.gguf"), null(t))
	h.expect(typeOpened, "mf", true)
	h.say(raw(typeOpen, "bad.gguf"), null(t))
	h.expect(typeRefused, "will not have bad.gguf", false)
	h.say(raw(typeOpen, "long.gguf"), null(t))
	h.expect(typeRefused, "too long for the hook", false)
	h.say(raw(typeFatal, "the reason"))
	h.conn.Close()
	within(t, "Gone", func() {
		if pid := <-f.gone; pid != os.Getpid() {
			t.Errorf("gone: %d, want the kernel's word, %d", pid, os.Getpid())
		}
	})
	if got := f.lastWords(); len(got) != 1 || got[0] != "the reason" {
		t.Errorf("last words %q", got)
	}
}

func TestRefusedHelloIsToldAndNeverGone(t *testing.T) {
	f := &fake{hello: errors.New("no room")}
	h := dial(t, serve(t, f))
	h.say(Hello{PID: 1}.encode())
	h.expect(typeRefused, "no room", false)
	h.expectEnd()
	select {
	case <-f.gone:
		t.Error("Gone for a peer whose hello was not granted")
	default:
	}
}

// Each of these ends its own connection and no other, and leaves no descriptor behind.
func TestMaliciousPeerEndsOnlyItself(t *testing.T) {
	f := &fake{}
	s := serve(t, f)
	honest := greet(t, s)
	long := append(raw(typeOpen, ""), make([]byte, 2*bodyMax)...)
	for name, attack := range map[string]func(*testing.T){
		"truncated":     func(t *testing.T) { h := dial(t, s); h.say([]byte("KVSS")); h.expect(typeRefused, "4 bytes", false) },
		"wrong version": func(t *testing.T) { h := dial(t, s); h.say(spoiled(4, 1)); h.expect(typeRefused, "version 1", false) },
		"open before hello": func(t *testing.T) {
			h := dial(t, s)
			h.say(raw(typeOpen, "x"), null(t))
			h.expect(typeRefused, "type 3 before hello", false)
		},
		"empty with a file": func(t *testing.T) { h := greet(t, s); h.say(nil, null(t)); h.expectEnd() },
		"hello twice":       func(t *testing.T) { h := greet(t, s); h.say(Hello{}.encode(), null(t)); h.expectEnd() },
		"open without file": func(t *testing.T) { h := greet(t, s); h.say(raw(typeOpen, "x")); h.expectEnd() },
		"open of no path":   func(t *testing.T) { h := greet(t, s); h.say(raw(typeOpen, ""), null(t)); h.expectEnd() },
		"too long":          func(t *testing.T) { h := greet(t, s); h.say(long, null(t)); h.expectEnd() },
		"many files": func(t *testing.T) {
			h := greet(t, s)
			n := null(t)
			h.say(raw(typeOpen, "x"), n, n, n, n, n, n, n)
			h.expectEnd()
		},
		"server's message": func(t *testing.T) { h := greet(t, s); h.say(text(typeStop, "x")); h.expectEnd() },
		"unknown type":     func(t *testing.T) { h := greet(t, s); h.say(raw(99, "")); h.expectEnd() },
		"two last words": func(t *testing.T) {
			h := greet(t, s)
			h.say(raw(typeFatal, "a"))
			h.say(raw(typeFatal, "b"))
			h.expectEnd()
		},
	} {
		t.Run(name, func(t *testing.T) {
			for range 3 {
				before := openFiles(t)
				t.Run("", attack)
				eventually(t, "its descriptors to be closed", func() bool { return openFiles(t) <= before })
			}
		})
	}
	honest.say(raw(typeOpen, "good.gguf"), null(t))
	honest.expect(typeOpened, "", true)
}

func TestFilesAreClosedAfterEveryOpen(t *testing.T) {
	h := greet(t, serve(t, &fake{}))
	model := null(t)
	before := openFiles(t)
	for range 50 {
		h.say(raw(typeOpen, "good"), model)
		h.expect(typeOpened, "", true)
		h.say(raw(typeOpen, "bad"), model, model)
		h.expect(typeRefused, "", false)
	}
	eventually(t, "descriptors to be closed", func() bool { return openFiles(t) <= before })
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

func TestStopReachesThePeersThatItIsFor(t *testing.T) {
	s := serve(t, &fake{})
	a, b := greet(t, s), greet(t, s)
	eventually(t, "the peers", func() bool { return len(s.connected()) == 2 })
	old := s.connected()
	later := greet(t, s)
	Stop("the enclave died", old...)
	for _, h := range []hook{a, b} {
		h.expect(typeStop, "the enclave died", false)
	}
	later.say(raw(typeOpen, "bad"), null(t))
	later.expect(typeRefused, "will not have bad", false)
}

// A peer that sends and never reads fills its socket; the others must be told nevertheless.
func TestStopIsNotHeldUpByAPeerThatDoesNotRead(t *testing.T) {
	f := &fake{}
	s := serve(t, f)
	good, stuck := greet(t, s), greet(t, s)
	model := null(t)
	if err := stuck.conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	message := raw(typeOpen, "bad"+strings.Repeat("x", 4000))
	for {
		if _, _, err := stuck.conn.WriteMsgUnix(message, unix.UnixRights(int(model.Fd())), nil); err != nil {
			break
		}
	}
	stopped := make(chan struct{})
	go func() { Stop("now", s.connected()...); close(stopped) }()
	good.expect(typeStop, "now", false)
	within(t, "Stop to return", func() { <-stopped })
	within(t, "the stuck peer to be dropped", func() { <-f.gone })
}

func TestCloseHangsUpOnEveryPeer(t *testing.T) {
	f := &fake{}
	s := serve(t, f)
	greeted, silent := greet(t, s), dial(t, s)
	eventually(t, "the peers", func() bool { return len(s.connected()) == 2 })
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	greeted.expectEnd()
	within(t, "Gone", func() { <-f.gone })
	if kind, _, _, err := silent.read(); err == nil && kind != typeRefused {
		t.Errorf("a peer that said nothing got message %d", kind)
	}
	if _, err := os.Stat(s.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestPeersAreLimited(t *testing.T) {
	s := serve(t, &fake{})
	for range maxPeers {
		dial(t, s)
	}
	eventually(t, "the peers", func() bool { return len(s.connected()) == maxPeers })
	late := dial(t, s)
	late.expect(typeRefused, fmt.Sprintf("%d engine processes are connected", maxPeers), false)
	late.expectEnd()
}

func TestListenSaysWhy(t *testing.T) {
	if _, err := Listen(filepath.Join(t.TempDir(), "absent", "s.sock"), &fake{}); err == nil || !strings.Contains(err.Error(), "cannot make the session socket") {
		t.Errorf("Listen: %v", err)
	}
}
