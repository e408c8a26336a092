package llamacpp_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/frame"
	"github.com/kvshield/kvshield/hooks/session"
)

var transports = map[string]session.Transport{"shared memory": session.SharedMemory, "socket": session.Socket}

// After a wrong answer nothing is printed: the process ends at the first transition that it cannot trust.
func TestWrongAnswers(t *testing.T) {
	misfit := "the enclave's answer for layer 0 does not fit the question"
	noFrame := fmt.Sprintf("the enclave's answer is not a frame of version %d", frame.Version)
	spoiled := func(spoil func(*frame.Header)) responder {
		return func(h frame.Header, rows []byte) []byte { return reply(h, rows, spoil) }
	}
	patched := func(at int, value uint32) responder {
		return func(h frame.Header, rows []byte) []byte {
			return patch(reply(h, rows, func(*frame.Header) {}), at, value)
		}
	}
	for name, test := range map[string]struct {
		respond responder
		want    string
	}{
		"sequence":       {spoiled(func(h *frame.Header) { h.Sequence++ }), "the enclave answered with sequence number 2 instead of 1"},
		"old sequence":   {spoiled(func(h *frame.Header) { h.Sequence = 0 }), "the enclave answered with sequence number 0 instead of 1"},
		"model":          {spoiled(func(h *frame.Header) { h.Model++ }), misfit},
		"layer":          {spoiled(func(h *frame.Header) { h.Layer++ }), misfit},
		"fewer rows":     {spoiled(func(h *frame.Header) { h.Rows--; h.Payload -= h.RowBytes }), misfit},
		"shorter rows":   {spoiled(func(h *frame.Header) { h.RowBytes -= 4; h.Payload -= 4 * h.Rows }), misfit},
		"too large":      {spoiled(func(h *frame.Header) { h.Payload = 1 << 31 }), misfit},
		"a request":      {spoiled(func(h *frame.Header) { h.Type = frame.Invert }), misfit},
		"unknown type":   {spoiled(func(h *frame.Header) { h.Type = 15 }), misfit},
		"reply + status": {spoiled(func(h *frame.Header) { h.Status = 1 }), misfit},
		"magic":          {patched(0, 1), noFrame},
		"version":        {patched(4, frame.Version+1|uint32(frame.Reply)<<16), noFrame},
		"error": {spoiled(func(h *frame.Header) {
			*h = frame.Header{Type: frame.Error, Model: h.Model, Layer: h.Layer, Sequence: h.Sequence, Status: frame.StatusRefused}
		}), "the enclave refused layer 0 of model 7 (error 3)"},
	} {
		for transportName, transport := range transports {
			t.Run(name+" over "+transportName, func(t *testing.T) {
				f := start(t, func(f *fake) { f.respond, f.transport = test.respond, transport })
				runHost(t, f.socket(), demoModel, "load", "decode").expectDeath(t, "load ok\n", test.want)
				f.expectFatal(t, test.want)
			})
		}
	}
}

func TestWrongAnswerInTheMiddle(t *testing.T) {
	first := uint64(built.opened.Layers)
	want := fmt.Sprintf("the enclave answered with sequence number %d instead of %d", first, first+2)
	for name, transport := range transports {
		t.Run(name, func(t *testing.T) {
			f := start(t, func(f *fake) {
				f.transport = transport
				f.respond = func(h frame.Header, rows []byte) []byte {
					return reply(h, rows, func(h *frame.Header) {
						if h.Sequence == first+2 {
							h.Sequence = first
						}
					})
				}
			})
			runHost(t, f.socket(), demoModel, "load", "decode", "decode").expectDeath(t, stock(t, "load", "decode"), want)
			f.expectFatal(t, want)
		})
	}
}

func TestNoAnswer(t *testing.T) {
	want := "the enclave did not answer within 300 ms; it is frozen, overloaded or gone"
	for name, transport := range transports {
		t.Run(name, func(t *testing.T) {
			f := start(t, func(f *fake) {
				f.transport, f.timeout = transport, 300*time.Millisecond
				f.respond = func(frame.Header, []byte) []byte { return nil }
			})
			runHost(t, f.socket(), demoModel, "load", "decode").expectDeath(t, "load ok\n", want)
			f.expectFatal(t, want)
		})
	}
}

// refusing is an enclave that answers by the rules, with an error.
type refusing struct{ err error }

func (r refusing) Invert(enclave.ModelID, int, []float32, []float32) error { return r.err }

func TestEnclaveThatRefuses(t *testing.T) {
	for _, test := range []struct {
		err    error
		status int
	}{{enclave.ErrUnknownModel, frame.StatusUnknownModel}, {errors.New("no such layer"), frame.StatusRefused}} {
		for name, transport := range transports {
			t.Run(fmt.Sprintf("%v over %s", test.err, name), func(t *testing.T) {
				f := start(t, func(f *fake) { f.transport, f.inverter = transport, refusing{test.err} })
				want := fmt.Sprintf("the enclave refused layer 0 of model 7 (error %d)", test.status)
				runHost(t, f.socket(), demoModel, "load", "decode").expectDeath(t, "load ok\n", want)
				f.expectFatal(t, want)
			})
		}
	}
}
