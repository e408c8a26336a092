package dataplane

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvshield/kvshield/hooks/frame"
)

// stream is the engine's end of a served socket.
type stream struct {
	net.Conn
	served chan error
}

func connectSocket(t *testing.T, capacity uint32) stream {
	t.Helper()
	engine, enclaveEnd := net.Pipe()
	s := stream{engine, make(chan error, 1)}
	go func() { s.served <- ServeSocket(enclaveEnd, &Target{Inverter: halves{}}, capacity); enclaveEnd.Close() }()
	t.Cleanup(func() { engine.Close() })
	if err := engine.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s stream) send(t *testing.T, h frame.Header, rows []byte) {
	t.Helper()
	b := make([]byte, frame.HeaderSize, frame.HeaderSize+len(rows))
	h.Encode(b)
	if _, err := s.Write(append(b, rows...)); err != nil {
		t.Fatal(err)
	}
}

func (s stream) receive(t *testing.T) (frame.Header, []float32) {
	t.Helper()
	b := make([]byte, frame.HeaderSize)
	if _, err := io.ReadFull(s, b); err != nil {
		t.Fatal(err)
	}
	h, err := frame.Decode(b, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	rows := make([]byte, h.Payload)
	if _, err := io.ReadFull(s, rows); err != nil {
		t.Fatal(err)
	}
	return h, floats(rows)
}

func TestSocketInverts(t *testing.T) {
	s := connectSocket(t, 4096)
	for i := range uint64(20) {
		s.send(t, request(i, 2, 1), bytesOf([]float32{float32(i), 2}))
		h, rows := s.receive(t)
		if h.Type != frame.Reply || h.Sequence != i || len(rows) != 2 || rows[0] != float32(i)/2 || rows[1] != 1 {
			t.Fatalf("transition %d: %+v %v", i, h, rows)
		}
	}
	s.Close()
	if err := <-s.served; err != nil {
		t.Errorf("ServeSocket after the engine hung up: %v", err)
	}
}

func TestSocketErrorKeepsTheStream(t *testing.T) {
	s := connectSocket(t, 4096)
	unknown := request(3, 1, 1)
	unknown.Model = known + 1
	s.send(t, unknown, make([]byte, 4))
	if h, _ := s.receive(t); h.Type != frame.Error || h.Status != frame.StatusUnknownModel || h.Sequence != 3 {
		t.Errorf("unknown model: %+v", h)
	}
	s.send(t, request(4, 1, 1), bytesOf([]float32{2}))
	if h, rows := s.receive(t); h.Type != frame.Reply || rows[0] != 1 {
		t.Errorf("after it: %+v %v", h, rows)
	}
}

func TestSocketHangsUpOnMalformed(t *testing.T) {
	beyond := request(1, 1, 2048)
	for name, h := range map[string]frame.Header{"empty": {}, "beyond the capacity": beyond} {
		t.Run(name, func(t *testing.T) {
			s := connectSocket(t, 4096)
			s.send(t, h, nil)
			if got, _ := s.receive(t); got.Type != frame.Error || got.Status != frame.StatusMalformed {
				t.Errorf("answer %+v", got)
			}
			if err := <-s.served; !errors.Is(err, frame.ErrMalformed) {
				t.Errorf("ServeSocket: %v", err)
			}
		})
	}
}

func TestSocketCutInMidFrame(t *testing.T) {
	for name, cut := range map[string]int{"header": 10, "before the rows": frame.HeaderSize, "rows": frame.HeaderSize + 2} {
		t.Run(name, func(t *testing.T) {
			s := connectSocket(t, 4096)
			b := make([]byte, frame.HeaderSize+4)
			request(1, 1, 1).Encode(b)
			if _, err := s.Write(b[:cut]); err != nil {
				t.Fatal(err)
			}
			s.Close()
			if err := <-s.served; !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("ServeSocket: %v", err)
			}
		})
	}
}

// The reply frame is shared memory too: its header is not believed.
func TestExchangeRefusesMalformedReply(t *testing.T) {
	f := create(t, 4096)
	engine, err := Map(f)
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	liar, err := Map(f)
	if err != nil {
		t.Fatal(err)
	}
	defer liar.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if !await(liar.word(offRequest), liar.word(offEnclaveSleeps), 0, 0, patience) {
			return
		}
		frame.Header{Type: frame.Reply, Rows: 1, RowBytes: 1 << 20, Payload: 1 << 20}.Encode(liar.replyFrame())
		atomic.AddUint32(liar.word(offReply), 1)
		futexWake(liar.word(offReply))
	}()
	if _, _, err := engine.Exchange(request(1, 1, 1), make([]byte, 4), 0, patience); !errors.Is(err, frame.ErrMalformed) {
		t.Errorf("Exchange: %v", err)
	}
	<-done
}

// A hostile engine owns its region: whatever it writes there, the enclave answers with a sound frame and goes on.
func FuzzRequestFrame(f *testing.F) {
	for _, h := range []frame.Header{{}, request(1, 1, 1), request(2, 4, 256), request(3, 1, 1<<20), {Type: frame.Error, Status: 1}} {
		b := make([]byte, frame.HeaderSize)
		h.Encode(b)
		f.Add(b, uint32(0))
	}
	file, err := Create(4096)
	if err != nil {
		f.Fatal(err)
	}
	r, err := Map(file)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { r.Close(); file.Close() })
	f.Fuzz(func(t *testing.T, b []byte, noise uint32) {
		clear(r.memory[page:])
		copy(r.memory[page:][:page], b)
		*r.word(offEngineSleeps), *r.word(offReply) = noise, noise
		r.answer(&Target{Inverter: halves{}})
		reply, err := frame.Decode(r.replyFrame(), r.capacity)
		if err != nil {
			t.Fatalf("the enclave's own answer is malformed: %v", err)
		}
		asked, err := frame.Decode(r.requestFrame(), r.capacity)
		sound := err == nil && asked.Type == frame.Invert && asked.Model == known && asked.Layer < tooHigh
		if sound != (reply.Type == frame.Reply) {
			t.Fatalf("asked %+v, answered %+v", asked, reply)
		}
	})
}

func FuzzSocket(f *testing.F) {
	b := make([]byte, frame.HeaderSize+4)
	request(1, 1, 1).Encode(b)
	f.Add(b)
	f.Add(b[:66])
	f.Add(append(append([]byte{}, b...), b...))
	f.Add([]byte("KVSF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		engine, enclaveEnd := net.Pipe()
		served := make(chan error, 1)
		go func() { served <- ServeSocket(enclaveEnd, &Target{Inverter: halves{}}, 4096); enclaveEnd.Close() }()
		go func() { _, _ = engine.Write(b); engine.Close() }()
		_, _ = io.Copy(io.Discard, engine)
		err := <-served
		known := errors.Is(err, frame.ErrMalformed) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.ErrClosedPipe)
		if err != nil && !known {
			t.Fatalf("ServeSocket: %v", err)
		}
	})
}
