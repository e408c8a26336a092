package resident

import (
	"bytes"
	"encoding/binary"

	"github.com/kvshield/kvshield/enclave"
)

type opener struct {
	state
	checked uint64 // records
	ended   bool
	wrong   bool // a record was refused: nothing of the state is used any more
}

// Opener refuses a header for other models at once; one that was changed gives the wrong key, so no record opens.
func (s *store) Opener(header []byte) (enclave.Opener, error) {
	made := &opener{state: state{s: s}}
	if len(header) != len(made.header) {
		return nil, enclave.ErrSealed
	}
	copy(made.header[:], header)
	if !s.accepts(made.header[:]) {
		return nil, enclave.ErrSealed
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	if err := made.derive(); err != nil {
		return nil, err
	}
	return made, nil
}

func (o *opener) Check(dst, record []byte) (text []byte, end bool, err error) {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	switch {
	case o.s.closed:
		return nil, false, errClosed
	case o.wrong || o.ended:
		return nil, false, enclave.ErrSealed
	}
	kind, buf, plain, err := o.open(record, o.checked)
	if err != nil {
		o.wrong = true
		return nil, false, err
	}
	defer func() { o.s.done(buf) }()
	if kind == recordEnd {
		if o.wrong = len(plain) != 8 || binary.LittleEndian.Uint64(plain) != o.checked; o.wrong {
			return nil, false, enclave.ErrSealed
		}
		o.ended = true
	}
	o.checked++
	if kind == recordText {
		text = append(dst, plain...)
		if text == nil {
			text = []byte{}
		}
	}
	return text, o.ended, nil
}

func (o *opener) Place(number int, record []byte, id enclave.CacheID, cells []int64) error {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	l, err := o.s.layer(id)
	if err != nil {
		return err
	}
	if o.wrong || number < 0 || uint64(number) >= o.checked {
		return enclave.ErrSealed
	}
	kind, buf, plain, err := o.open(record, uint64(number))
	if err != nil {
		return err
	}
	defer func() { o.s.done(buf) }()
	if kind != recordCells {
		return enclave.ErrSealed
	}
	return l.place(plain, cells)
}

// place writes the text of a cells record into cells.
func (l *layer) place(text []byte, cells []int64) error {
	var want [cellsHeader]byte
	l.describe(want[:], len(cells))
	size := l.shape.CellBytes()
	if len(text) < cellsHeader || !bytes.Equal(text[:cellsHeader], want[:]) || int64(len(text)-cellsHeader) != int64(len(cells))*int64(size) {
		return l.misfit("the saved cells are of another shape or number than these %d", len(cells))
	}
	text = text[cellsHeader:]
	for i, cell := range cells {
		c, place, err := l.find(cell)
		if err == nil {
			err = l.wrap(c.Import(place, text[i*size:][:size]))
		}
		if err != nil {
			return err
		}
	}
	return nil
}
