package tenant

import (
	"encoding/json"
	"errors"
	"testing"
)

func TestBodyNamesTheSlot(t *testing.T) {
	for name, test := range map[string]struct {
		in, out string
		many    bool
	}{
		"empty":               {`{}`, `{"id_slot":3}`, false},
		"numbers stay":        {`{"a":1e400,"seed":18446744073709551615,"x":0.10}`, `{"id_slot":3,"a":1e400,"seed":18446744073709551615,"x":0.10}`, false},
		"another slot":        {`{"id_slot":0,"prompt":"p"}`, `{"id_slot":3,"prompt":"p"}`, false},
		"twice":               {`{"id_slot":0,"prompt":"p","id_slot":1}`, `{"id_slot":3,"prompt":"p"}`, false},
		"written otherwise":   {`{"id\u005fslot":0,"slot\u005fid":1}`, `{"id_slot":3}`, false},
		"inside":              {`{"o":{"id_slot":0}}`, `{"id_slot":3,"o":{"id_slot":0}}`, false},
		"one answer":          {`{"n":1}`, `{"id_slot":3,"n":1}`, false},
		"two answers":         {`{"n":2}`, `{"id_slot":3,"n":2}`, true},
		"two, the other name": {`{"n_cmpl":2}`, `{"id_slot":3,"n_cmpl":2}`, true},
		"one hidden by two":   {`{"n":2,"n":1}`, `{"id_slot":3,"n":2,"n":1}`, true},
		"a number in words":   {`{"n":"2"}`, `{"id_slot":3,"n":"2"}`, true},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := parse([]byte(test.in))
			if err != nil || string(b.in(3)) != test.out || b.many != test.many {
				t.Errorf("%s, many %v, error %v; want %s, %v", b.in(3), b.many, err, test.out, test.many)
			}
		})
	}
}

func TestBodyMustBeAnObject(t *testing.T) {
	for _, text := range []string{"", "[]", "1", `"a"`, "{", `{"a"}`, `{"a":}`, `{} {}`, `{}x`, `{"a":1,}`, "\xff"} {
		if _, err := parse([]byte(text)); !errors.Is(err, errNotObject) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzBody(f *testing.F) {
	f.Add([]byte(`{"id_slot":0,"n":2,"prompt":[1,2,{"a":null}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		b, err := parse(text)
		if err != nil {
			return
		}
		var said map[string]json.RawMessage
		if err := json.Unmarshal(b.in(7), &said); err != nil || string(said["id_slot"]) != "7" {
			t.Errorf("%q became %q: %v", text, b.in(7), err)
		}
	})
}
