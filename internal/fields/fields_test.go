package fields

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"testing"
)

func pick(text string, piece int, paths ...string) map[string]string {
	got := map[string]string{}
	p := NewPicker(NewSet(paths...), func(id int, v []byte, quoted bool) {
		if quoted {
			got[paths[id]] = fmt.Sprintf("%q", v)
			return
		}
		got[paths[id]] = string(v)
	})
	for ; len(text) > piece; text = text[piece:] {
		p.Feed([]byte(text[:piece]))
	}
	p.Feed([]byte(text))
	return got
}

func TestPick(t *testing.T) {
	paths := []string{"model", "n", "usage.in", "usage.details.cached", "choices.*.why", "stream"}
	for name, test := range map[string]struct {
		text string
		want map[string]string
	}{
		"scalars":            {`{"model":"m","n":-1.5e+3,"stream":true}`, map[string]string{"model": `"m"`, "n": "-1.5e+3", "stream": "true"}},
		"nested":             {`{"usage":{"x":1,"in":5,"details":{"cached":3}}}`, map[string]string{"usage.in": "5", "usage.details.cached": "3"}},
		"items":              {`{"choices":[{"why":"stop"},{"x":[{"why":"no"}],"why":null}]}`, map[string]string{"choices.*.why": "null"}},
		"same names inside":  {`{"messages":[{"model":"no","n":1}],"n":2}`, map[string]string{"n": "2"}},
		"names inside texts": {`{"prompt":"\"model\":\"no\",\"n\":1","n":2}`, map[string]string{"n": "2"}},
		"escapes":            {`{"model":"a\u0062","n":2}`, map[string]string{"n": "2"}},
		"escaped names":      {`{"mod\u0065l":"a","n":2}`, map[string]string{"n": "2"}},
		"blanks":             {" {\n \"n\" :\t2 , \"usage\" : { } , \"choices\" : [ ] }", map[string]string{"n": "2"}},
		"one after another":  {"{\"n\":1}\n{\"n\":2}\n", map[string]string{"n": "2"}},
		"long":               {`{"model":"` + strings.Repeat("a", MaxString+1) + `","n":2}`, map[string]string{"n": "2"}},
		"just not long":      {`{"model":"` + strings.Repeat("a", MaxString) + `"}`, map[string]string{"model": `"` + strings.Repeat("a", MaxString) + `"`}},
		"another kind":       {`{"usage":3,"choices":{"why":"no"},"model":{"n":1},"n":2}`, map[string]string{"n": "2"}},
		"no JSON":            {`n=3&{"n":1}`, map[string]string{}},
		"broken":             {`{"n":1,,"stream":true}`, map[string]string{"n": "1"}},
		"too deep":           {strings.Repeat("[", MaxDepth+1) + `{"n":1}`, map[string]string{}},
		"cut":                {`{"model":"m","n":12`, map[string]string{"model": `"m"`}},
		"closing too often":  {`}}]]{"n":1}`, map[string]string{}},
	} {
		for _, piece := range []int{1, 3, 1 << 20} {
			t.Run(fmt.Sprint(name, " ", piece), func(t *testing.T) {
				if got := pick(test.text, piece, paths...); !maps.Equal(got, test.want) {
					t.Errorf("%v, want %v", got, test.want)
				}
			})
		}
	}
}

func TestResetBeginsAnew(t *testing.T) {
	got := ""
	p := NewPicker(NewSet("n"), func(_ int, v []byte, _ bool) { got += string(v) })
	for _, text := range []string{`{"x":{"n":1,"y":"`, `{"n":2}`, `nonsense!`, `{"n":3}`} {
		p.Feed([]byte(text))
		p.Reset()
	}
	if got != "23" {
		t.Errorf("found %q", got)
	}
}

// What the picker finds at the top is what a JSON parser finds there.
func FuzzPick(f *testing.F) {
	f.Add(`{"n":1,"x":[{"n":2}],"m":"a\"b"}`)
	f.Add(`{"m":"x","m":"y","n":null}`)
	f.Fuzz(func(t *testing.T, text string) {
		got := pick(text, 7, "n", "m")
		var want map[string]json.RawMessage
		if strings.Contains(text, `\`) || len(text) > MaxString || json.Unmarshal([]byte(text), &want) != nil {
			return
		}
		for name, v := range got {
			var a, b any
			if json.Unmarshal([]byte(v), &a) != nil || json.Unmarshal(want[name], &b) != nil {
				continue // bytes that a parser replaces
			}
			if _, ok := b.(string); ok != (v[0] == '"') {
				t.Errorf("%q: %s is %s, want %s", text, name, v, want[name])
			}
		}
	})
}

func BenchmarkEvent(b *testing.B) {
	event := []byte(`{"choices":[{"finish_reason":null,"index":0,"delta":{"content":" the"}}],"created":1795685286,"id":"chatcmpl-wGlUlu3vrpscTRqmcXlbAdp1aEmcptoa","model":"demo.gguf","object":"chat.completion.chunk"}`)
	p := NewPicker(NewSet("choices.*.finish_reason", "id", "model", "usage.prompt_tokens", "timings.prompt_n"), func(int, []byte, bool) {})
	b.SetBytes(int64(len(event)))
	for b.Loop() {
		p.Reset()
		p.Feed(event)
	}
}
