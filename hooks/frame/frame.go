// Package frame is the data-plane frame: a fixed header of 64 bytes, little-endian, followed by rows of F32 (mode permute) or
// by a body of its type's own (mode resident; bodies.go).
//
// docs/protocol.md has the layout byte by byte; hooks/core/channel.c is its C end. Decode takes bytes from an
// untrusted peer and answers with an error; it never panics and allocates nothing.
package frame

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// HeaderSize is the length of an encoded Header, in bytes.
const HeaderSize = 64

// Version of the frame and of the shared memory's control block.
const Version = 3

const magic = 0x4653564b // "KVSF"

// Type of a frame.
type Type uint16

const (
	Invert Type = 1 // engine to enclave: rows of a layer's attention output, permuted
	Reply  Type = 2 // enclave to engine: the same rows, inverted
	Error  Type = 3 // enclave to engine: no rows; Status says why, the payload may say it in words

	// Mode resident, engine to enclave. The header's Model is the [enclave.CacheID] of one layer, or a batch's slot.
	Declare Type = 4  // a context's caches
	Release Type = 5  // a cache is gone
	Clear   Type = 6  // a cache's cells are
	Copy    Type = 7  // a stream becomes another's copy
	Batch   Type = 8  // cells and mask of a graph's tokens
	Attend  Type = 9  // keys, values and queries
	Rotate  Type = 10 // a context shift
	Keep    Type = 11 // which cells are still in use
	Seal    Type = 12 // writes a sealed state
	Unseal  Type = 13 // reads one
	Answer  Type = 14 // enclave to engine: what a request of these types is answered with
)

// ErrorTextMax is the most bytes of text in an Error.
const ErrorTextMax = 512

// Status of an Error frame.
const (
	StatusMalformed    = 1 // the request is not a sound frame
	StatusUnknownModel = 2 // no such model, or not one that this engine opened
	StatusRefused      = 3 // the layer or the shape does not fit the model
)

// Header of a frame.
type Header struct {
	Type     Type
	Model    uint32 // enclave.ModelID
	Layer    uint32 // layer, from 0
	Rows     uint32 // rows that follow
	RowBytes uint32 // bytes of one row, a multiple of 4
	Sequence uint64 // of the request; a reply carries its request's
	Payload  uint32 // bytes that follow the header: Rows * RowBytes where there are rows
	Status   uint32 // of an Error
	Worked   uint64 // of what the enclave sends: nanoseconds that it took, for information
}

// ErrMalformed is wrapped by every error of Decode.
var ErrMalformed = errors.New("malformed data-plane frame")

func malformed(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, a...))
}

// Encode writes the header to dst, which must have HeaderSize bytes.
func (h Header) Encode(dst []byte) {
	_ = dst[HeaderSize-1]
	le := binary.LittleEndian
	le.PutUint32(dst[0:], magic)
	le.PutUint16(dst[4:], Version)
	le.PutUint16(dst[6:], uint16(h.Type))
	le.PutUint32(dst[8:], h.Model)
	le.PutUint32(dst[12:], h.Layer)
	le.PutUint32(dst[16:], h.Rows)
	le.PutUint32(dst[20:], h.RowBytes)
	le.PutUint64(dst[24:], h.Sequence)
	le.PutUint32(dst[32:], h.Payload)
	le.PutUint32(dst[36:], h.Status)
	le.PutUint64(dst[40:], h.Worked)
	clear(dst[48:HeaderSize])
}

// Decode reads a header and checks that its lengths agree with each other and with capacity, the most
// payload bytes that the receiver has room for.
func Decode(src []byte, capacity uint32) (Header, error) {
	if len(src) < HeaderSize {
		return Header{}, malformed("%d bytes where the header has %d", len(src), HeaderSize)
	}
	le := binary.LittleEndian
	if m := le.Uint32(src); m != magic {
		return Header{}, malformed("magic %#x", m)
	}
	if v := le.Uint16(src[4:]); v != Version {
		return Header{}, malformed("version %d where %d is spoken", v, Version)
	}
	h := Header{
		Type:     Type(le.Uint16(src[6:])),
		Model:    le.Uint32(src[8:]),
		Layer:    le.Uint32(src[12:]),
		Rows:     le.Uint32(src[16:]),
		RowBytes: le.Uint32(src[20:]),
		Sequence: le.Uint64(src[24:]),
		Payload:  le.Uint32(src[32:]),
		Status:   le.Uint32(src[36:]),
		Worked:   le.Uint64(src[40:]),
	}
	for _, b := range src[48:HeaderSize] {
		if b != 0 {
			return Header{}, malformed("reserved bytes are not zero")
		}
	}
	return h, h.check(capacity)
}

func (h Header) check(capacity uint32) error {
	switch h.Type {
	case Invert, Reply:
		switch {
		case h.Status != 0:
			return malformed("status %d in a frame that carries rows", h.Status)
		case h.Rows == 0 || h.RowBytes == 0 || h.RowBytes%4 != 0:
			return malformed("%d rows of %d bytes", h.Rows, h.RowBytes)
		case uint64(h.Rows)*uint64(h.RowBytes) != uint64(h.Payload):
			return malformed("%d rows of %d bytes in a payload of %d", h.Rows, h.RowBytes, h.Payload)
		case h.Payload > capacity:
			return malformed("payload of %d bytes where %d fit", h.Payload, capacity)
		}
	case Error:
		if h.Payload > ErrorTextMax || h.Status == 0 {
			return malformed("an error with status %d and a payload of %d bytes", h.Status, h.Payload)
		}
	case Declare, Release, Clear, Copy, Batch, Attend, Rotate, Keep, Seal, Unseal, Answer:
		if h.Status != 0 || h.Rows != 0 || h.RowBytes != 0 || h.Payload > capacity {
			return malformed("type %d with status %d, rows, or a payload of %d bytes where %d fit", h.Type, h.Status, h.Payload, capacity)
		}
	default:
		return malformed("type %d", h.Type)
	}
	return nil
}
