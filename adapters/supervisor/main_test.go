package supervisor

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/session"
	"github.com/kvshield/kvshield/internal/gguf"
	"github.com/kvshield/kvshield/plugin"
)

const patience = 20 * time.Second

// TestMain makes this binary its own enclave and its own engine.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "enclave":
			os.Exit(beEnclave(os.Args[2:]))
		case "deaf-engine":
			os.Exit(beDeafEngine(os.Args[2]))
		}
	}
	// The forking thread lives as long as the process, by design.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/kvshield/kvshield/internal/forker.Do.func1.1"))
}

func beEnclave(args []string) int {
	flags := flag.NewFlagSet("enclave", flag.ExitOnError)
	dir := flags.String("runtime-dir", "", "")
	_ = flags.Parse(args)
	f := &fake{dir: *dir}
	if err := plugin.Serve(plugin.Implementation{Loader: f, Inverter: f, Attester: f}, *dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// beDeafEngine says hello and then heeds nothing, like an engine that was stopped.
func beDeafEngine(socket string) int {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return 1
	}
	if _, err := conn.Write(message(msgHello, "\x01\x00\x00\x00deaf")); err != nil {
		return 1
	}
	time.Sleep(10 * patience)
	return 0
}

const trailer = "shielded"

// fake is an enclave that shields a model by adding a trailer, and inverts by halving. The architecture says what it
// does with a model.
type fake struct {
	dir  string
	last atomic.Uint32
}

func (f *fake) Inspect(_ context.Context, sources []string) (enclave.Model, error) {
	file, g, err := gguf.Open(sources[0])
	if err != nil {
		return enclave.Model{}, enclave.Invalid("%v", err)
	}
	defer file.Close()
	architecture, _, _ := g.Text("general.architecture")
	switch architecture {
	case "refused":
		return enclave.Model{}, enclave.Refuse("an architecture that cannot be shielded")
	case "pass":
		return enclave.Model{Action: enclave.Pass}, nil
	}
	return enclave.Model{Action: enclave.Shield, Files: len(sources), Layers: 1, RowFloats: 1, Bytes: g.Size}, nil
}

func (f *fake) Load(ctx context.Context, r enclave.LoadRequest) (enclave.LoadResult, error) {
	m, err := f.Inspect(ctx, r.Sources)
	res := enclave.LoadResult{ID: enclave.ModelID(f.last.Add(1)), Model: m, Marker: "marker", Fingerprint: []byte("print")}
	for i, source := range r.Sources {
		info, e := os.Stat(source)
		if e != nil {
			return res, e
		}
		out, e := os.OpenFile(r.Outputs[i], os.O_WRONLY, 0)
		if e != nil {
			return res, e
		}
		_, e = out.WriteAt([]byte(trailer), info.Size())
		err = errors.Join(err, e, out.Close())
		res.Copies = append(res.Copies, enclave.Copy{File: i, Length: info.Size()})
		res.OutputSizes = append(res.OutputSizes, info.Size()+int64(len(trailer)))
	}
	return res, err
}

func (f *fake) Unload(_ context.Context, id enclave.ModelID) error {
	return os.WriteFile(filepath.Join(f.dir, fmt.Sprintf("unloaded-%d", id)), nil, 0o600)
}

func (f *fake) Attest(context.Context, []byte) (enclave.Report, error) {
	return enclave.Report{Backend: "fake"}, nil
}

func (f *fake) Invert(_ enclave.ModelID, _ int, dst, src []float32) error {
	for i, v := range src {
		dst[i] = v / 2
	}
	return nil
}

// base is a runtime base directory of this test alone, short enough for a socket's path.
func base(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kvs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("XDG_RUNTIME_DIR", dir)
	return dir
}

func config(t *testing.T) Config {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	hook := filepath.Join(t.TempDir(), "libkvshield.so")
	if err := os.WriteFile(hook, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return Config{Hook: hook, Enclave: program, Args: []string{"enclave"}, Capacity: 8192, Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
}

func start(t *testing.T, change func(*Config)) *Supervisor {
	t.Helper()
	base(t)
	cfg := config(t)
	if change != nil {
		change(&cfg)
	}
	s, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// The session socket's messages as the C hook sends them: docs/protocol.md.
const (
	msgHello   = 1
	msgWelcome = 2
	msgOpen    = 3
	msgOpened  = 4
	msgRefused = 5
	msgFatal   = 6
	msgStop    = 7
	msgMeter   = 10
)

func message(kind uint16, body string) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, 0x5353564b)
	b = le.AppendUint16(le.AppendUint16(b, session.Version), kind)
	b = le.AppendUint32(le.AppendUint32(b, uint32(len(body))), 0)
	return append(b, body...)
}

// peer is an engine's hook, within this process.
type peer struct {
	t     *testing.T
	conn  *net.UnixConn
	meter *os.File
}

func dial(t *testing.T, s *Supervisor) peer {
	t.Helper()
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: s.server.Path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return peer{t: t, conn: conn}
}

// greet says hello and returns the data plane's file.
func greet(t *testing.T, s *Supervisor) (peer, *os.File) {
	t.Helper()
	p := dial(t, s)
	p.hello()
	_, f := p.expect(msgWelcome)
	if f == nil {
		t.Fatal("a welcome without a data plane")
	}
	if _, p.meter = p.expect(msgMeter); p.meter == nil {
		t.Fatal("no meter")
	}
	return p, f
}

func (p peer) hello() {
	p.t.Helper()
	p.say(msgHello, "\x01\x00\x00\x000.27", nil)
}

func (p peer) say(kind uint16, body string, f *os.File) {
	p.t.Helper()
	var rights []byte
	if f != nil {
		rights = unix.UnixRights(int(f.Fd()))
	}
	if _, _, err := p.conn.WriteMsgUnix(message(kind, body), rights, nil); err != nil {
		p.t.Fatal(err)
	}
}

func (p peer) expect(kind uint16) (string, *os.File) {
	p.t.Helper()
	buf, oob := make([]byte, 8208), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := p.conn.ReadMsgUnix(buf, oob)
	if err != nil || n < 16 {
		p.t.Fatalf("waiting for message %d: %d bytes, %v", kind, n, err)
	}
	var f *os.File
	if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(messages) == 1 {
		if fds, err := unix.ParseUnixRights(&messages[0]); err == nil {
			f = os.NewFile(uintptr(fds[0]), "received")
			p.t.Cleanup(func() { f.Close() })
		}
	}
	if got := binary.LittleEndian.Uint16(buf[6:]); got != kind {
		p.t.Fatalf("message %d %q, want %d", got, buf[16:n], kind)
	}
	return string(buf[16:n]), f
}

func (p peer) open(path string) {
	p.t.Helper()
	f, err := os.Open(path)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	p.say(msgOpen, path, f)
}

// shielded opens a model and returns its number and the shielded file.
func (p peer) shielded(path string) (uint32, *os.File) {
	p.t.Helper()
	p.open(path)
	body, f := p.expect(msgOpened)
	if f == nil || !strings.HasSuffix(body, "markerprint") {
		p.t.Fatalf("opened %q, file %v", body, f)
	}
	return binary.LittleEndian.Uint32([]byte(body[4:])), f
}

func writeModel(t *testing.T, name, architecture string, splits int) string {
	t.Helper()
	var b gguf.Builder
	b.Key("general.architecture", architecture)
	if splits > 1 {
		b.Key("split.count", uint16(splits))
	}
	b.Tensor("blk.0.attn_q.weight", gguf.F32, []int64{32, 4}, nil)
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := b.WriteTo(f); err != nil {
		t.Fatal(err)
	}
	return name
}

func within(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("waited %v for %s", patience, what)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

func gone(path string) bool {
	_, err := os.Stat(path)
	return errors.Is(err, os.ErrNotExist)
}

func reaped(pid int) bool { return gone(fmt.Sprintf("/proc/%d", pid)) }
