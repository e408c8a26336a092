package plugin

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/dataplane"
	"github.com/kvshield/kvshield/hooks/frame"
)

const capacity = 4096

func question(model enclave.ModelID) (frame.Header, []byte) {
	h := frame.Header{Type: frame.Invert, Model: uint32(model), Rows: 1, RowBytes: 4, Sequence: 1, Payload: 4}
	rows := make([]byte, 4)
	*(*float32)(unsafe.Pointer(&rows[0])) = 6
	return h, rows
}

// answers is what came back: 3 where the enclave inverted, else the status of the error.
func answers(h frame.Header, rows []byte) (float32, uint32) {
	if h.Type == frame.Error {
		return 0, h.Status
	}
	return *(*float32)(unsafe.Pointer(&rows[0])), 0
}

func attachRegion(t *testing.T, c *Client) (uint32, *dataplane.Region) {
	t.Helper()
	f, err := dataplane.Create(capacity)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	paths, release, err := c.Lend(bounded(t), f)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	p, err := c.AttachShared(bounded(t), paths[0], time.Microsecond)
	if err != nil {
		t.Fatal(err)
	}
	r, err := dataplane.Map(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return p.ID, r
}

func ask(t *testing.T, r *dataplane.Region, model enclave.ModelID) (float32, uint32) {
	t.Helper()
	h, rows := question(model)
	reply, back, err := r.Exchange(h, rows, 0, patience)
	if err != nil {
		t.Fatal(err)
	}
	return answers(reply, back)
}

func TestGrantsBelongToOnePlane(t *testing.T) {
	c, ctx := start(t, nil), bounded(t)
	a, regionA := attachRegion(t, c)
	b, regionB := attachRegion(t, c)
	expect := func(when string, r *dataplane.Region, value float32, status uint32) {
		t.Helper()
		if v, s := ask(t, r, someLoad.ID); v != value || s != status {
			t.Errorf("%s: value %v, status %d; want %v, %d", when, v, s, value, status)
		}
	}
	expect("before any grant", regionA, 0, frame.StatusUnknownModel)
	if err := c.Grant(ctx, a, someLoad.ID); err != nil {
		t.Fatal(err)
	}
	expect("granted", regionA, 3, 0)
	expect("granted to the other", regionB, 0, frame.StatusUnknownModel)
	if v, s := ask(t, regionA, someLoad.ID+1); v != 0 || s != frame.StatusUnknownModel {
		t.Errorf("another model: %v, status %d", v, s)
	}
	if err := c.Grant(ctx, b, someLoad.ID); err != nil {
		t.Fatal(err)
	}
	expect("granted to both", regionB, 3, 0)
	if err := c.Unload(ctx, someLoad.ID); err != nil {
		t.Fatal(err)
	}
	expect("unloaded", regionA, 0, frame.StatusUnknownModel)
	expect("unloaded", regionB, 0, frame.StatusUnknownModel)
}

func TestUnknownPlanes(t *testing.T) {
	c, ctx := start(t, nil), bounded(t)
	id, _ := attachRegion(t, c)
	if err := c.Detach(ctx, id); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"detach twice": c.Detach(ctx, id), "grant": c.Grant(ctx, id, 1), "detach": c.Detach(ctx, 99)} {
		if err == nil || !strings.HasPrefix(err.Error(), "no data plane ") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestDetachedRegionIsNotAnswered(t *testing.T) {
	s := newPlanes(Implementation{Inverter: fake{}}, "")
	f, err := dataplane.Create(capacity)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	reply, err := s.attachShared(procPath(f), 0)
	if err != nil {
		t.Fatal(err)
	}
	r, err := dataplane.Map(f)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := s.grant(reply.GetPlane(), 1); err != nil {
		t.Fatal(err)
	}
	if v, _ := ask(t, r, 1); v != 3 {
		t.Fatalf("attached: %v", v)
	}
	if err := s.detach(reply.GetPlane()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the plane to fall silent", func() bool {
		h, rows := question(1)
		_, _, err := r.Exchange(h, rows, 0, 50*time.Millisecond)
		return err != nil
	})
}

func procPath(f *os.File) string { return hostPaths([]*os.File{f})[0] }

func TestAttachSharedRefuses(t *testing.T) {
	s := newPlanes(Implementation{Inverter: fake{}}, "")
	plain, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	for path, want := range map[string]string{"/absent": "cannot open the data plane", plain.Name(): "not sealed"} {
		if _, err := s.attachShared(path, 0); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func attachSocket(t *testing.T, s *planes) (uint32, string, []byte) {
	t.Helper()
	reply, err := s.attachSocket(capacity)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.detach(reply.GetPlane()) })
	return reply.GetPlane(), reply.GetAddress(), reply.GetToken()
}

func dialPlane(t *testing.T, address string, first []byte) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(first); err != nil {
		t.Fatal(err)
	}
	return conn
}

func askSocket(t *testing.T, conn net.Conn, model enclave.ModelID) (float32, uint32) {
	t.Helper()
	h, rows := question(model)
	b := make([]byte, frame.HeaderSize, frame.HeaderSize+len(rows))
	h.Encode(b)
	if _, err := conn.Write(append(b, rows...)); err != nil {
		t.Fatal(err)
	}
	b = make([]byte, frame.HeaderSize)
	if _, err := io.ReadFull(conn, b); err != nil {
		t.Fatal(err)
	}
	reply, err := frame.Decode(b, capacity)
	if err != nil {
		t.Fatal(err)
	}
	rows = make([]byte, reply.Payload)
	if _, err := io.ReadFull(conn, rows); err != nil {
		t.Fatal(err)
	}
	return answers(reply, rows)
}

func TestSocketPlane(t *testing.T) {
	s := newPlanes(Implementation{Inverter: fake{}}, socketDir(t))
	id, address, token := attachSocket(t, s)
	conn := dialPlane(t, address, token)
	if _, status := askSocket(t, conn, 1); status != frame.StatusUnknownModel {
		t.Errorf("before the grant: status %d", status)
	}
	if _, err := os.Stat(address); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket takes another connection: %v", err)
	}
	if err := s.grant(id, 1); err != nil {
		t.Fatal(err)
	}
	if v, status := askSocket(t, conn, 1); v != 3 {
		t.Errorf("granted: %v, status %d", v, status)
	}
	if err := s.detach(id); err != nil {
		t.Fatal(err)
	}
	expectHangUp(t, conn)
}

// A connection that was not read to its end is cut with a reset.
func expectHangUp(t *testing.T, conn net.Conn) {
	t.Helper()
	n, err := conn.Read(make([]byte, 1))
	if n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection goes on: %d bytes, %v", n, err)
	}
}

func TestSocketPlaneWithoutItsToken(t *testing.T) {
	s := newPlanes(Implementation{Inverter: fake{}}, socketDir(t))
	for name, change := range map[string]func([]byte) []byte{
		"wrong": func(b []byte) []byte { b[tokenSize-1] ^= 1; return b },
		"zeros": func([]byte) []byte { return make([]byte, tokenSize) },
		"frame": func([]byte) []byte {
			b := make([]byte, frame.HeaderSize)
			h, _ := question(1)
			h.Encode(b)
			return b
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, address, token := attachSocket(t, s)
			expectHangUp(t, dialPlane(t, address, change(bytes.Clone(token))))
		})
	}
}

func TestTokensDiffer(t *testing.T) {
	s := newPlanes(Implementation{Inverter: fake{}}, socketDir(t))
	_, _, a := attachSocket(t, s)
	_, _, b := attachSocket(t, s)
	if len(a) != tokenSize || bytes.Equal(a, b) {
		t.Errorf("tokens %x and %x", a, b)
	}
}

func TestDetachBeforeAnyConnection(t *testing.T) {
	s := newPlanes(Implementation{Inverter: fake{}}, socketDir(t))
	id, address, _ := attachSocket(t, s)
	if err := s.detach(id); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(address); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestAttachSocketRefusesCapacity(t *testing.T) {
	s := newPlanes(Implementation{Inverter: fake{}}, socketDir(t))
	for _, n := range []uint32{0, 3, maxCapacity + 4} {
		if _, err := s.attachSocket(n); err == nil {
			t.Errorf("a capacity of %d was taken", n)
		}
	}
}

func TestSocketPlaneThroughTheClient(t *testing.T) {
	c, ctx := start(t, nil), bounded(t)
	p, err := c.AttachSocket(ctx, capacity)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Grant(ctx, p.ID, someLoad.ID); err != nil {
		t.Fatal(err)
	}
	if v, status := askSocket(t, dialPlane(t, p.Address, p.Token), someLoad.ID); v != 3 {
		t.Errorf("value %v, status %d", v, status)
	}
}
