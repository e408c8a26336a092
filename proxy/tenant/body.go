package tenant

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strconv"
)

// errNotObject is a body that is not one JSON object.
var errNotObject = errors.New("the body is not a JSON object")

// body is the top level of a JSON object: its members as they came, less those that choose a slot.
type body struct {
	members []byte // ,"name":value for each
	many    bool   // more than one answer is asked for, which the engine makes in slots of its own choice
}

// parse reads an object without touching the values, so that numbers and fields that are not known stay what they were.
func parse(text []byte) (body, error) {
	var b body
	d := json.NewDecoder(bytes.NewReader(text))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return b, errNotObject
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return b, errNotObject
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return b, errNotObject
		}
		if name == "id_slot" || name == "slot_id" {
			continue
		}
		if name == "n" || name == "n_cmpl" {
			b.many = b.many || string(value) != "1" && string(value) != "null"
		}
		key, err := json.Marshal(name)
		if err != nil {
			return b, errNotObject
		}
		b.members = append(append(append(append(b.members, ','), key...), ':'), value...)
	}
	if _, err := d.Token(); err != nil {
		return b, errNotObject
	}
	if _, err := d.Token(); err != io.EOF {
		return b, errNotObject
	}
	return b, nil
}

// in is the object for a slot.
func (b body) in(slot int) []byte {
	out := make([]byte, 0, len(b.members)+24)
	out = append(append(out, `{"id_slot":`...), strconv.Itoa(slot)...)
	return append(append(out, b.members...), '}')
}
