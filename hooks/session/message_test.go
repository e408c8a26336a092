package session

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

// raw is a message as a hook would send it, for the tests to spoil.
func raw(t Type, body string) []byte { return encode(t, []byte(body)) }

func spoiled(at int, value byte) []byte {
	b := raw(typeHello, "1234ggml")
	b[at] = value
	return b
}

func TestDecodeRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		message []byte
		want    string
	}{
		"nothing":         {nil, "0 bytes where the header has 16"},
		"half a header":   {raw(typeHello, "")[:15], "15 bytes where the header has 16"},
		"magic":           {spoiled(0, 'X'), "magic 0x53535658"},
		"version":         {spoiled(4, 9), "version 9 where 6 is spoken; use a command and a libkvshield.so of the same version"},
		"high version":    {spoiled(5, 1), "version 262 where 6 is spoken"},
		"reserved":        {spoiled(15, 1), "reserved bytes are not zero"},
		"length too much": {spoiled(8, 9), "length 9 with 8 bytes"},
		"length too few":  {spoiled(8, 7), "length 7 with 8 bytes"},
		"length huge":     {spoiled(11, 0xff), "with 8 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := decode(test.message)
			if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("decode: %v, want ErrMalformed with %q", err, test.want)
			}
		})
	}
}

func TestDecodeHelloBounds(t *testing.T) {
	for _, test := range []struct {
		length int
		ok     bool
	}{{0, false}, {3, false}, {4, true}, {260, true}, {261, false}, {bodyMax, false}} {
		if _, err := decodeHello(make([]byte, test.length)); (err == nil) != test.ok {
			t.Errorf("a hello of %d bytes: %v", test.length, err)
		}
	}
	h, err := decodeHello([]byte("\x01\x02\x00\x00ggml 1"))
	if err != nil || h != (Hello{PID: 0x201, Version: "ggml 1"}) {
		t.Errorf("decodeHello: %+v, %v", h, err)
	}
}

func TestDecodeOpenBounds(t *testing.T) {
	for _, test := range []struct {
		length int
		ok     bool
	}{{0, false}, {1, true}, {pathMax, true}, {pathMax + 1, false}} {
		if _, err := decodeOpen(make([]byte, test.length)); (err == nil) != test.ok {
			t.Errorf("a path of %d bytes: %v", test.length, err)
		}
	}
}

// The bytes are what hooks/core/session.c reads: they may not change without the version.
func TestAnswersByteForByte(t *testing.T) {
	opened, err := Opened{Shield: true, Model: 7, Layers: 2, RowFloats: 64, RotaryDim: 16, RotaryBase: 10000, Marker: "m", Fingerprint: []byte{9, 8},
		Overlay: []Range{{From: 1, To: 2, Length: 3}}, Pairs: []uint16{3, 0}, FixedHeads: true}.encode()
	if err != nil {
		t.Fatal(err)
	}
	passed, err := Opened{}.encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		got  []byte
		want string
	}{
		"welcome": {Welcome{SharedMemory, 4096, 50, 10_000, true, true, true, true}.encode(),
			"KVSS\x06\x00\x02\x00\x14\x00\x00\x00\x00\x00\x00\x00" + "\x01\x00\x00\x00\x00\x10\x00\x00\x32\x00\x00\x00\x10\x27\x00\x00\x0f\x00\x00\x00"},
		"opened": {opened, "KVSS\x06\x00\x04\x00\x4b\x00\x00\x00\x00\x00\x00\x00" + "\x01\x00\x00\x00\x07\x00\x00\x00\x02\x00\x00\x00\x40\x00\x00\x00" + "\x10\x00\x00\x00\x00\x40\x1c\x46\x01\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00" + "m\x09\x08" +
			"\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00" +
			"\x03\x00\x00\x00"},
		"passed": {passed, "KVSS\x06\x00\x04\x00\x2c\x00\x00\x00\x00\x00\x00\x00" + "\x02\x00\x00\x00" + strings.Repeat("\x00", 40)},
		"meter":  {encode(typeMeter, nil), "KVSS\x06\x00\x0a\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		"stop":   {text(typeStop, "go"), "KVSS\x06\x00\x07\x00\x02\x00\x00\x00\x00\x00\x00\x00go"},
	} {
		if got := string(test.got); got != test.want {
			t.Errorf("%s:\n% x, want\n% x", name, got, test.want)
		}
	}
}

func TestOpenedKeepsToTheHooksBuffers(t *testing.T) {
	for _, test := range []struct {
		marker, fingerprint, ranges int
		ok                          bool
	}{{MarkerMax, fingerprintMax, OverlayMax, true}, {MarkerMax + 1, 1, 0, false}, {1, fingerprintMax + 1, 0, false}, {1, 1, OverlayMax + 1, false}} {
		b, err := Opened{Marker: strings.Repeat("m", test.marker), Fingerprint: make([]byte, test.fingerprint), Overlay: make([]Range, test.ranges)}.encode()
		if (err == nil) != test.ok || len(b) > headerSize+bodyMax {
			t.Errorf("%+v: %d bytes, %v", test, len(b), err)
		}
	}
}

func TestTextIsCutToTheHooksBuffer(t *testing.T) {
	_, body, err := decode(text(typeRefused, strings.Repeat("x", bodyMax+100)))
	if err != nil || len(body) != bodyMax {
		t.Errorf("a body of %d bytes, %v; want %d", len(body), err, bodyMax)
	}
}

func FuzzDecode(f *testing.F) {
	opened, err := Opened{Shield: true, Model: 1, Layers: 1, RowFloats: 4, Marker: "m", Fingerprint: []byte("f")}.encode()
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range [][]byte{
		nil, Hello{PID: 1, Version: "0.27"}.encode(), raw(typeOpen, "/a/b.gguf"), raw(typeFatal, "why"),
		Welcome{Socket, 1, 2, 3, false, false, false, false}.encode(), opened, text(typeRefused, "no"), text(typeStop, "stop"), spoiled(4, 3),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		kind, body, err := decode(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("an error of another kind: %v", err)
			}
			return
		}
		if again := encode(kind, body); !bytes.Equal(again, b) {
			t.Fatalf("encoded again:\n% x, was\n% x", again, b)
		}
		if h, err := decodeHello(body); kind == typeHello && err == nil && !bytes.Equal(h.encode(), b) {
			t.Fatalf("a hello encoded again:\n% x, was\n% x", h.encode(), b)
		}
		if path, err := decodeOpen(body); kind == typeOpen && err == nil && path != string(body) {
			t.Fatalf("path %q of %q", path, body)
		}
	})
}
