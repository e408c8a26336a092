package dataplane

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/frame"
)

// Target is what answers an engine: an inverter in mode permute, a store in mode resident. What is nil is refused.
type Target struct {
	Inverter enclave.Inverter
	Store    enclave.Store

	parts  [enclave.Batches][]byte // of batches that are still arriving
	sealer enclave.Sealer
	opener enclave.Opener
}

var errNoStore = errors.New("this enclave keeps no cache for this engine")

// answer does what a request asks and returns the header to send back, with its payload in out.
func (t *Target) answer(request frame.Header, err error, in, out []byte) frame.Header {
	start := time.Now()
	reply := t.reply(request, err, in, out)
	reply.Worked = uint64(time.Since(start))
	return reply
}

func (t *Target) reply(request frame.Header, err error, in, out []byte) frame.Header {
	reply := frame.Header{Type: frame.Answer, Model: request.Model, Layer: request.Layer, Sequence: request.Sequence}
	if err != nil {
		return t.refuse(reply, frame.StatusMalformed, err, out)
	}
	var status uint32
	switch request.Type {
	case frame.Invert:
		if status, err = t.invert(request, in, out); err == nil {
			request.Type = frame.Reply
			return request
		}
	case frame.Reply, frame.Error, frame.Answer:
		status, err = frame.StatusMalformed, fmt.Errorf("%w: type %d is no request", frame.ErrMalformed, request.Type)
	default:
		reply.Payload, status, err = t.cache(request, in[:request.Payload], out)
	}
	if err != nil {
		return t.refuse(reply, status, err, out)
	}
	return reply
}

// refuse says why in words; none of them holds anything of the request but numbers.
func (t *Target) refuse(reply frame.Header, status uint32, err error, out []byte) frame.Header {
	reply.Type, reply.Status = frame.Error, status
	reply.Payload = uint32(copy(out[:min(frame.ErrorTextMax, len(out))], err.Error()))
	return reply
}

func (t *Target) invert(h frame.Header, in, out []byte) (uint32, error) {
	if t.Inverter == nil {
		return frame.StatusUnknownModel, enclave.ErrUnknownModel
	}
	n := h.Payload
	err := t.Inverter.Invert(enclave.ModelID(h.Model), int(h.Layer), floats(out[:n]), floats(in[:n]))
	switch {
	case errors.Is(err, enclave.ErrUnknownModel):
		return frame.StatusUnknownModel, err
	case err != nil:
		return frame.StatusRefused, err
	}
	return 0, nil
}

func (t *Target) cache(h frame.Header, in, out []byte) (payload, status uint32, err error) {
	if t.Store == nil {
		return 0, frame.StatusRefused, errNoStore
	}
	n, err := t.dispatch(h, in, out)
	switch {
	case errors.Is(err, frame.ErrMalformed):
		return 0, frame.StatusMalformed, err
	case err != nil:
		return 0, frame.StatusRefused, err
	}
	return uint32(n), 0, nil
}

func (t *Target) dispatch(h frame.Header, in, out []byte) (int, error) {
	id := enclave.CacheID(h.Model)
	switch h.Type {
	case frame.Declare:
		return t.declare(in, out)
	case frame.Release:
		return 0, t.Store.Release(id)
	case frame.Clear:
		return 0, t.Store.Clear(id)
	case frame.Copy:
		from, to, err := frame.DecodeCopy(in)
		if err != nil {
			return 0, err
		}
		return 0, t.Store.Copy(id, from, to)
	case frame.Batch:
		return 0, t.batch(int(h.Model), in)
	case frame.Attend:
		return t.attend(id, in, out)
	case frame.Rotate:
		r, err := frame.DecodeRotate(in)
		if err != nil {
			return 0, err
		}
		return 0, t.Store.Rotate(id, r)
	case frame.Keep:
		first, n, keep, err := frame.DecodeKeep(in)
		if err != nil {
			return 0, err
		}
		return 0, t.Store.Keep(id, first, n, keep)
	case frame.Seal:
		return t.seal(id, in, out)
	case frame.Unseal:
		return t.unseal(id, in, out)
	}
	return 0, fmt.Errorf("%w: type %d", frame.ErrMalformed, h.Type)
}

func (t *Target) declare(in, out []byte) (int, error) {
	layers, err := frame.DecodeDeclare(in)
	if err != nil {
		return 0, err
	}
	r, err := t.Store.Declare(layers)
	full, refused := errors.AsType[*enclave.MemoryError](err)
	if refused {
		r, err = full.Reservation, nil
	}
	if err != nil {
		return 0, err
	}
	frame.EncodeDeclared(out, r, refused)
	return frame.DeclareAnswer, nil
}

// batch collects the parts of a batch, which come in order, and begins it with the last one.
func (t *Target) batch(slot int, in []byte) error {
	p, err := frame.DecodeBatch(in)
	if err != nil {
		return err
	}
	if slot < 0 || slot >= len(t.parts) {
		return fmt.Errorf("%w: batch slot %d", frame.ErrMalformed, slot)
	}
	if p.Offset == 0 {
		t.parts[slot] = t.parts[slot][:0]
	}
	if p.Offset != int64(len(t.parts[slot])) {
		return fmt.Errorf("%w: a part of a batch at %d where %d is next", frame.ErrMalformed, p.Offset, len(t.parts[slot]))
	}
	t.parts[slot] = append(t.parts[slot], p.Data...)
	if int64(len(t.parts[slot])) < p.Total {
		return nil
	}
	return t.Store.Begin(slot, p.Fill(t.parts[slot]))
}

func (t *Target) attend(id enclave.CacheID, in, out []byte) (int, error) {
	a, n, err := frame.DecodeAttend(in, floats)
	if err != nil {
		return 0, err
	}
	if 4*n > len(out) {
		return 0, fmt.Errorf("%w: an answer of %d floats where %d bytes fit", frame.ErrMalformed, n, len(out))
	}
	a.Out = floats(out[:4*n])
	return 4 * n, t.Store.Attend(id, &a)
}

// room makes sure that what is appended to out fits.
func room(b, out []byte, err error) (int, error) {
	if err == nil && len(b) > len(out) {
		err = fmt.Errorf("%w: an answer of %d bytes where %d fit", frame.ErrMalformed, len(b), len(out))
	}
	return copy(out, b), err
}

func (t *Target) seal(id enclave.CacheID, in, out []byte) (int, error) {
	op, rest, err := frame.DecodeSeal(in)
	if err != nil {
		return 0, err
	}
	if op == frame.SealBegin {
		if t.sealer, err = t.Store.Sealer(); err != nil {
			return 0, err
		}
		return room(t.sealer.Header(), out, nil)
	}
	if t.sealer == nil {
		return 0, fmt.Errorf("%w: no sealed state was begun", frame.ErrMalformed)
	}
	var record []byte
	switch op {
	case frame.SealText:
		record, err = t.sealer.Text(nil, rest)
	case frame.SealCells:
		var cells []int64
		if cells, err = frame.DecodeCells(rest); err == nil {
			record, err = t.sealer.Cells(nil, id, cells)
		}
	case frame.SealEnd:
		record, err = t.sealer.End(nil)
		t.sealer = nil
	default:
		err = fmt.Errorf("%w: seal operation %d", frame.ErrMalformed, op)
	}
	return room(record, out, err)
}

func (t *Target) unseal(id enclave.CacheID, in, out []byte) (int, error) {
	op, rest, err := frame.DecodeSeal(in)
	if err != nil {
		return 0, err
	}
	rest = slices.Clone(rest) // what is authenticated must be what is used
	switch {
	case op == frame.UnsealBegin:
		t.opener, err = t.Store.Opener(rest)
		return 0, err
	case t.opener == nil:
		return 0, fmt.Errorf("%w: no sealed state was begun", frame.ErrMalformed)
	case op == frame.UnsealCheck:
		text, end, err := t.opener.Check(nil, rest)
		answer := make([]byte, 8, 8+len(text))
		if end {
			answer[0] = 1
		}
		if text != nil {
			answer[4] = 1
		}
		return room(append(answer, text...), out, err)
	case op == frame.UnsealPlace:
		number, cells, record, err := frame.DecodePlace(rest)
		if err != nil {
			return 0, err
		}
		return 0, t.opener.Place(number, record, id, cells)
	}
	return 0, fmt.Errorf("%w: unseal operation %d", frame.ErrMalformed, op)
}
