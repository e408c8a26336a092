package dataplane

import (
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/kvshield/kvshield/hooks/frame"
)

// idle is how long an end sleeps at most before it looks whether it was closed.
const idle = 250 * time.Millisecond

// Serve answers the engine's frames until Stop. It keeps one operating-system thread.
func (r *Region) Serve(t *Target, spin time.Duration) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	seen := uint32(0)
	for !r.closed.Load() {
		if !await(r.word(offRequest), r.word(offEnclaveSleeps), seen, spin, idle) {
			continue
		}
		seen++
		r.answer(t)
		atomic.AddUint32(r.word(offReply), 1)
		if atomic.LoadUint32(r.word(offEngineSleeps)) != 0 {
			futexWake(r.word(offReply))
		}
	}
}

// Stop makes Serve return.
func (r *Region) Stop() {
	r.closed.Store(true)
	futexWake(r.word(offRequest))
}

func (r *Region) answer(t *Target) {
	var raw [frame.HeaderSize]byte
	copy(raw[:], r.requestFrame())
	request, err := frame.Decode(raw[:], r.capacity)
	reply := t.answer(request, err, r.requestRows(), r.replyRows())
	reply.Encode(r.replyFrame())
}

// ServeSocket answers frames on a stream socket until it ends. Capacity is the most payload of one frame.
func ServeSocket(conn net.Conn, t *Target, capacity uint32) error {
	request := make([]byte, frame.HeaderSize)
	in := make([]byte, capacity)
	reply := make([]byte, frame.HeaderSize+int(capacity))
	for {
		if _, err := io.ReadFull(conn, request); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		h, err := frame.Decode(request, capacity)
		if err == nil {
			if _, err := io.ReadFull(conn, in[:h.Payload]); errors.Is(err, io.EOF) {
				return io.ErrUnexpectedEOF
			} else if err != nil {
				return err
			}
		}
		out := t.answer(h, err, in, reply[frame.HeaderSize:])
		out.Encode(reply)
		if _, err := conn.Write(reply[:frame.HeaderSize+int(out.Payload)]); err != nil {
			return err
		}
		if err != nil {
			return fmt.Errorf("hung up: %w", err) // the stream's framing is lost
		}
	}
}

// Exchange sends one request and waits for its reply, which lies in the returned slice until the next call. It is
// the engine's end in Go; there may be one at a time.
func (r *Region) Exchange(h frame.Header, rows []byte, spin, timeout time.Duration) (frame.Header, []byte, error) {
	h.Encode(r.requestFrame())
	copy(r.requestRows(), rows)
	before := atomic.LoadUint32(r.word(offReply))
	atomic.AddUint32(r.word(offRequest), 1)
	if atomic.LoadUint32(r.word(offEnclaveSleeps)) != 0 {
		futexWake(r.word(offRequest))
	}
	if !await(r.word(offReply), r.word(offEngineSleeps), before, spin, timeout) {
		return frame.Header{}, nil, fmt.Errorf("the enclave did not answer within %v", timeout)
	}
	var raw [frame.HeaderSize]byte
	copy(raw[:], r.replyFrame())
	reply, err := frame.Decode(raw[:], r.capacity)
	if err != nil {
		return frame.Header{}, nil, err
	}
	return reply, r.replyRows()[:reply.Payload], nil
}
