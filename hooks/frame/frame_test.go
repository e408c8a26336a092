package frame_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/hooks/frame"
)

var sound = frame.Header{Type: frame.Invert, Model: 7, Layer: 3, Rows: 2, RowBytes: 128, Sequence: 1 << 40, Payload: 256}

func encode(h frame.Header) []byte {
	b := make([]byte, frame.HeaderSize)
	h.Encode(b)
	return b
}

func TestDecodeReadsWhatEncodeWrote(t *testing.T) {
	for _, h := range []frame.Header{sound, {Type: frame.Error, Sequence: 9, Status: frame.StatusRefused}} {
		got, err := frame.Decode(encode(h), 1<<20)
		if err != nil || got != h {
			t.Errorf("Decode(Encode(%+v)) = %+v, %v", h, got, err)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	change := func(edit func(*frame.Header)) []byte {
		h := sound
		edit(&h)
		return encode(h)
	}
	poke := func(at int, v byte) []byte {
		b := encode(sound)
		b[at] = v
		return b
	}
	tests := map[string]struct {
		bytes []byte
		want  string
	}{
		"short":             {encode(sound)[:63], "63 bytes"},
		"magic":             {poke(0, 'X'), "magic"},
		"version":           {poke(4, 1), "version 1"},
		"type":              {change(func(h *frame.Header) { h.Type = 15 }), "type 15"},
		"no rows":           {change(func(h *frame.Header) { h.Rows, h.Payload = 0, 0 }), "0 rows"},
		"odd row":           {change(func(h *frame.Header) { h.RowBytes, h.Payload = 6, 12 }), "rows of 6 bytes"},
		"product wraps":     {change(func(h *frame.Header) { h.Rows, h.RowBytes, h.Payload = 1<<31, 8, 0 }), "payload of 0"},
		"payload differs":   {change(func(h *frame.Header) { h.Payload = 252 }), "payload of 252"},
		"more than fits":    {change(func(h *frame.Header) { h.Rows, h.Payload = 1<<14, 1<<21 }), "1048576 fit"},
		"status on rows":    {change(func(h *frame.Header) { h.Status = 1 }), "status 1"},
		"error with rows":   {change(func(h *frame.Header) { h.Type, h.Status, h.Payload = frame.Error, 1, frame.ErrorTextMax+1 }), "an error with"},
		"error status zero": {encode(frame.Header{Type: frame.Error}), "an error with status 0"},
		"reserved":          {poke(63, 1), "reserved"},
	}
	for name, test := range tests {
		_, err := frame.Decode(test.bytes, 1<<20)
		if !errors.Is(err, frame.ErrMalformed) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, test.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(encode(sound), uint32(1<<20))
	f.Add(encode(frame.Header{Type: frame.Error, Status: 1}), uint32(0))
	f.Fuzz(func(t *testing.T, b []byte, capacity uint32) {
		h, err := frame.Decode(b, capacity)
		if err != nil {
			return
		}
		if h.Payload > capacity {
			t.Errorf("accepted a payload of %d bytes with room for %d", h.Payload, capacity)
		}
		if !bytes.Equal(encode(h), b[:frame.HeaderSize]) {
			t.Errorf("%+v does not encode to the bytes it came from", h)
		}
	})
}
