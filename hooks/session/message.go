// Package session is the socket on which hooks say hello and exchange their models: the wire format and the
// supervisor's end. The C end is hooks/core/session.c; docs/protocol.md has it byte by byte.
//
// Start with [Listen]. Messages come from engine processes, which are not trusted: a malformed one ends that
// connection with an error and nothing else.
package session

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// Version of the session socket's messages.
const Version = 6

const (
	magic      = 0x5353564b // "KVSS"
	headerSize = 16
	bodyMax    = 8192
)

// Type of a message.
type Type uint16

const (
	typeHello   Type = 1
	typeWelcome Type = 2
	typeOpen    Type = 3
	typeOpened  Type = 4
	typeRefused Type = 5
	typeFatal   Type = 6
	typeStop    Type = 7
	typeDump    Type = 8
	typeDumped  Type = 9
	typeMeter   Type = 10
)

// Transport of the data plane.
type Transport uint32

const (
	SharedMemory Transport = 1
	Socket       Transport = 2
)

// ErrMalformed is wrapped by every decoding error.
var ErrMalformed = errors.New("malformed session message")

func malformed(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, a...))
}

// Hello is the first message of a hook.
type Hello struct {
	PID     uint32 // as the process sees itself; a namespace may show it another one
	Version string // of the engine's ggml
}

// Welcome tells a hook how to reach the enclave. A file descriptor comes along: the shared memory, or a
// connected socket; none where the hook only observes.
type Welcome struct {
	Transport Transport
	Capacity  uint32 // payload bytes of a frame, at most
	SpinMicro uint32 // how long the hook spins before it sleeps, µs
	TimeoutMS uint32 // how long the hook waits for an answer before it ends its process, ms
	Dumps     bool   // the hook obeys [Peer.Dump]; else it refuses
	Observe   bool   // graphs run as in a stock engine: nothing is shielded
	Resident  bool   // keys and values go into the enclave, and models are opened as they are
	Scrub     bool   // with Resident: what they were made from is wiped in the engine
}

const (
	flagDumps    = 1 << 0
	flagObserve  = 1 << 1
	flagResident = 1 << 2
	flagScrub    = 1 << 3
)

// Range is a run of whole pages of a shielded model that the hook takes from the original.
type Range struct{ From, To, Length uint64 }

// What an Opened can carry at most: ranges, and bytes of a marker.
const (
	OverlayMax = 300
	MarkerMax  = 63
)

// Opened answers an Open. With Shield a file descriptor of the shielded model comes along.
type Opened struct {
	Shield      bool
	Reside      bool   // the engine opens the model as it is; only Model and Marker are set
	Clear       bool   // its user allows that the process runs in the clear; nothing else is set
	Model       uint32 // enclave.ModelID
	Layers      uint32
	RowFloats   uint32
	RotaryDim   uint32  // what the engine's rotary embedding must be called with: rows,
	RotaryBase  float32 // and base of the frequencies
	Marker      string  // name of the tensor that Fingerprint belongs to, at most 63 bytes; with Reside the architecture
	Overlay     []Range
	Fingerprint []byte   // at most 256 bytes
	Pairs       []uint16 // enclave.LoadResult's, at most 256; empty when the model's file has the frequency factors
	FixedHeads  bool     // a bias that differs from head to head is right
}

const (
	actionShield   = 1
	actionPass     = 2
	actionReside   = 3
	actionClear    = 4
	fingerprintMax = 256
	pathMax        = 4096
	pairsMax       = 256 // with all ranges, a packet is full

	flagFixedHeads = 1 << 0
)

func encode(t Type, body []byte) []byte {
	b := make([]byte, headerSize, headerSize+len(body))
	le := binary.LittleEndian
	le.PutUint32(b[0:], magic)
	le.PutUint16(b[4:], Version)
	le.PutUint16(b[6:], uint16(t))
	le.PutUint32(b[8:], uint32(len(body)))
	return append(b, body...)
}

func decode(b []byte) (Type, []byte, error) {
	le := binary.LittleEndian
	switch {
	case len(b) < headerSize:
		return 0, nil, malformed("%d bytes where the header has %d", len(b), headerSize)
	case le.Uint32(b) != magic:
		return 0, nil, malformed("magic %#x", le.Uint32(b))
	case le.Uint16(b[4:]) != Version:
		return 0, nil, malformed("version %d where %d is spoken; use a command and a libkvshield.so of the same version", le.Uint16(b[4:]), Version)
	case le.Uint32(b[12:]) != 0:
		return 0, nil, malformed("reserved bytes are not zero")
	case le.Uint32(b[8:]) != uint32(len(b)-headerSize):
		return 0, nil, malformed("length %d with %d bytes", le.Uint32(b[8:]), len(b)-headerSize)
	}
	return Type(le.Uint16(b[6:])), b[headerSize:], nil
}

func (h Hello) encode() []byte {
	return encode(typeHello, append(binary.LittleEndian.AppendUint32(nil, h.PID), h.Version...))
}

func decodeHello(body []byte) (Hello, error) {
	if len(body) < 4 || len(body) > 4+256 {
		return Hello{}, malformed("a hello of %d bytes", len(body))
	}
	return Hello{binary.LittleEndian.Uint32(body), string(body[4:])}, nil
}

func (w Welcome) encode() []byte {
	b := make([]byte, 20)
	le := binary.LittleEndian
	var flags uint32
	for flag, set := range map[uint32]bool{flagDumps: w.Dumps, flagObserve: w.Observe, flagResident: w.Resident, flagScrub: w.Scrub} {
		if set {
			flags |= flag
		}
	}
	le.PutUint32(b[0:], uint32(w.Transport))
	le.PutUint32(b[4:], w.Capacity)
	le.PutUint32(b[8:], w.SpinMicro)
	le.PutUint32(b[12:], w.TimeoutMS)
	le.PutUint32(b[16:], flags)
	return encode(typeWelcome, b)
}

func decodeOpen(body []byte) (path string, err error) {
	if len(body) == 0 || len(body) > pathMax {
		return "", malformed("a path of %d bytes", len(body))
	}
	return string(body), nil
}

func (o Opened) encode() ([]byte, error) {
	if len(o.Marker) > MarkerMax || len(o.Fingerprint) > fingerprintMax || len(o.Overlay) > OverlayMax || len(o.Pairs) > pairsMax {
		return nil, fmt.Errorf("marker of %d bytes, fingerprint of %d, %d ranges, %d rotary pairs: too long for the hook", len(o.Marker), len(o.Fingerprint), len(o.Overlay), len(o.Pairs))
	}
	action, flags := uint32(actionPass), uint32(0)
	if o.FixedHeads {
		flags |= flagFixedHeads
	}
	switch {
	case o.Shield:
		action = actionShield
	case o.Reside:
		action = actionReside
	case o.Clear:
		action = actionClear
	}
	var b []byte
	for _, v := range []uint32{action, o.Model, o.Layers, o.RowFloats, o.RotaryDim, math.Float32bits(o.RotaryBase), uint32(len(o.Marker)), uint32(len(o.Fingerprint)), uint32(len(o.Overlay)), uint32(len(o.Pairs)), flags} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	b = append(append(b, o.Marker...), o.Fingerprint...)
	for _, r := range o.Overlay {
		for _, v := range []uint64{r.From, r.To, r.Length} {
			b = binary.LittleEndian.AppendUint64(b, v)
		}
	}
	for _, p := range o.Pairs {
		b = binary.LittleEndian.AppendUint16(b, p)
	}
	return encode(typeOpened, b), nil
}

// text bounds a message for people to what the hook has room for.
func text(t Type, s string) []byte {
	if len(s) > bodyMax {
		s = s[:bodyMax]
	}
	return encode(t, []byte(s))
}
