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
	several bool   // of prompts
	slot    int    // that the client asked for; -1 for any
}

// parse reads an object without touching the values, so that numbers and fields that are not known stay what they were.
func parse(text []byte) (body, error) {
	b := body{slot: -1}
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
			b.slot = number(value)
			continue
		}
		if name == "prompt" {
			b.several = isList(value)
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

// number is a slot's, or -1.
func number(value json.RawMessage) int {
	n, err := strconv.Atoi(string(value))
	if err != nil || n < 0 {
		return -1
	}
	return n
}

// isList is true for a list of prompts: one of numbers is a prompt of tokens.
func isList(value json.RawMessage) bool {
	rest, found := bytes.CutPrefix(value, []byte("["))
	rest = bytes.TrimLeft(rest, " \t\r\n")
	return found && len(rest) > 0 && (rest[0] == '"' || rest[0] == '[')
}

// in is the object for a slot.
func (b body) in(slot int) []byte {
	out := make([]byte, 0, len(b.members)+24)
	out = append(append(out, `{"id_slot":`...), strconv.Itoa(slot)...)
	return append(append(out, b.members...), '}')
}
