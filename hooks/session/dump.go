package session

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"sync"
)

// RefusedError is a hook that did not dump.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return "the engine's hook made no dump: " + e.Reason }

// ErrGone is a peer that went away before it answered.
var ErrGone = errors.New("the engine ended before it made its dump")

// Dump has the hook write what its engine's memory holds to a regular file, before the next graph with attention that the
// engine computes, and waits until it has. The format is in docs/protocol.md. A hook whose [Welcome] did not allow
// it refuses: [RefusedError].
func (p *Peer) Dump(ctx context.Context, file *os.File) error {
	number, answered, err := p.dumps.ask()
	if err != nil {
		return err
	}
	defer p.dumps.forget(number)
	if err := p.write(encode(typeDump, binary.LittleEndian.AppendUint32(nil, number)), file); err != nil {
		return err
	}
	select {
	case err := <-answered:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// dumps that a peer was asked for and has not answered.
type dumps struct {
	mu      sync.Mutex
	asked   uint32
	waiting map[uint32]chan<- error // each takes one error without waiting
	ended   bool
}

func (d *dumps) ask() (number uint32, answered <-chan error, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended {
		return 0, nil, ErrGone
	}
	if d.waiting == nil {
		d.waiting = map[uint32]chan<- error{}
	}
	c := make(chan error, 1)
	d.asked++
	d.waiting[d.asked] = c
	return d.asked, c, nil
}

func (d *dumps) forget(number uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.waiting, number)
}

// answer passes a DUMPED on to whoever waits for it. Nobody may: a wait can end before the engine computes.
func (d *dumps) answer(body []byte) error {
	a, err := decodeDumped(body)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if a.Number == 0 || a.Number > d.asked {
		return malformed("a dump %d that was not asked for", a.Number)
	}
	if c := d.waiting[a.Number]; c != nil {
		delete(d.waiting, a.Number)
		c <- a.err()
	}
	return nil
}

func (d *dumps) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ended = true
	for _, c := range d.waiting {
		c <- ErrGone
	}
	d.waiting = nil
}

// dumped answers a DUMP.
type dumped struct {
	Number  uint32 // of the DUMP
	Refusal string // empty: the file is complete
}

func (a dumped) err() error {
	if a.Refusal == "" {
		return nil
	}
	return &RefusedError{a.Refusal}
}

const (
	statusDumped  = 0
	statusRefused = 1
	refusalMax    = 512
)

func (a dumped) encode() []byte {
	status := uint32(statusDumped)
	if a.Refusal != "" {
		status = statusRefused
	}
	le := binary.LittleEndian
	return encode(typeDumped, append(le.AppendUint32(le.AppendUint32(nil, a.Number), status), a.Refusal...))
}

func decodeDumped(body []byte) (dumped, error) {
	if len(body) < 8 || len(body) > 8+refusalMax {
		return dumped{}, malformed("an answer to a dump of %d bytes", len(body))
	}
	status, reason := binary.LittleEndian.Uint32(body[4:]), string(body[8:])
	if status > statusRefused || (status == statusRefused) != (reason != "") {
		return dumped{}, malformed("an answer to a dump with status %d and a reason of %d bytes", status, len(reason))
	}
	return dumped{binary.LittleEndian.Uint32(body), reason}, nil
}
