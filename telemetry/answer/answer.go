// Package answer reads what an engine says of an answer, beside the text, while the answer passes: how many tokens it took, why it ended.
//
// Start with [New], with the answer's header; then [Scanner.Feed] the body in whatever pieces it comes, and ask for [Scanner.Said]. It understands
// llama-server's own API, OpenAI's (chat, completions, responses), Anthropic's messages and Ollama's; event streams, newline-delimited JSON and plain JSON.
//
// Promise: it keeps numbers, and of texts only the answer's identifier, the model's name and the reason why it ended.
package answer

import (
	"bytes"
	"mime"
	"net/http"
	"strconv"
	"strings"

	"github.com/kvshield/kvshield/internal/fields"
)

// Usage is what the engine said. Numbers are -1 where it said nothing.
type Usage struct {
	Input     int // tokens of the prompt, cached ones included
	Cached    int // of them, those that were cached
	Output    int // tokens of the answer
	Processed int // tokens of the prompt that were computed, where the engine counts these
	ID, Model string
	Finish    []string // why the answers ended
}

// number of a usage, and how sure it is: what the engine measured wins over what an API makes of it.
type number int

const (
	computed  number = iota // timings
	cachedT                 // timings
	predicted               // timings
	input                   // of the whole prompt
	uncached                // of the prompt, less what was cached
	cached
	output
	numbers
)

const (
	isID     = -1
	isModel  = -2
	isFinish = -3
)

// members that are looked for, and what they say.
var members = []struct {
	path string
	what int
}{
	{"timings.prompt_n", int(computed)}, {"timings.cache_n", int(cachedT)}, {"timings.predicted_n", int(predicted)},
	{"*.timings.prompt_n", int(computed)}, {"*.timings.cache_n", int(cachedT)}, {"*.timings.predicted_n", int(predicted)},
	{"usage.prompt_tokens", int(input)}, {"usage.completion_tokens", int(output)}, {"usage.prompt_tokens_details.cached_tokens", int(cached)},
	{"response.usage.input_tokens", int(input)}, {"response.usage.output_tokens", int(output)}, {"response.usage.input_tokens_details.cached_tokens", int(cached)},
	{"usage.input_tokens_details.cached_tokens", int(cached)},
	{"usage.input_tokens", int(uncached)}, {"usage.output_tokens", int(output)}, {"usage.cache_read_input_tokens", int(cached)},
	{"message.usage.input_tokens", int(uncached)}, {"message.usage.output_tokens", int(output)}, {"message.usage.cache_read_input_tokens", int(cached)},
	{"tokens_evaluated", int(input)}, {"tokens_predicted", int(output)},
	{"prompt_eval_count", int(input)}, {"eval_count", int(output)},
	{"id", isID}, {"message.id", isID}, {"response.id", isID},
	{"model", isModel}, {"message.model", isModel}, {"response.model", isModel},
	{"choices.*.finish_reason", isFinish}, {"stop_type", isFinish}, {"*.stop_type", isFinish}, {"done_reason", isFinish},
	{"stop_reason", isFinish}, {"delta.stop_reason", isFinish},
	{"object", isObject},
}

// isObject tells the responses API, whose input_tokens count cached ones too, from the messages API.
const isObject = -4

var set = func() *fields.Set {
	var paths []string
	for _, m := range members {
		paths = append(paths, m.path)
	}
	return fields.NewSet(paths...)
}()

// reasons for which engines end an answer.
var reasons = []string{"stop", "length", "tool_calls", "function_call", "content_filter", "eos", "limit", "word", "end_turn", "max_tokens", "stop_sequence", "tool_use", "load", "unload"}

const maxFinish = 8

// Scanner of one answer. It is not for several goroutines at a time.
type Scanner struct {
	picker    *fields.Picker
	events    bool // the body is a stream of events
	streamed  bool
	line      []byte // the beginning of a line, as far as "data:" goes
	inData    bool
	skip      bool // the rest of the line means nothing
	off       bool // the body cannot be read
	said      [numbers]int
	inclusive bool
	usage     Usage
}

// New scanner for an answer with this header.
func New(h http.Header) *Scanner {
	s := &Scanner{}
	for i := range s.said {
		s.said[i] = -1
	}
	t, _, _ := mime.ParseMediaType(h.Get("Content-Type"))
	s.events = t == "text/event-stream"
	s.streamed = s.events || t == "application/x-ndjson"
	encoding := h.Get("Content-Encoding")
	s.off = !s.events && t != "application/json" && t != "application/x-ndjson" || encoding != "" && encoding != "identity"
	s.picker = fields.NewPicker(set, s.found)
	return s
}

// Feed the scanner with the next bytes of the body.
func (s *Scanner) Feed(b []byte) {
	switch {
	case s.off:
	case s.events:
		s.feedEvents(b)
	default:
		s.picker.Feed(b)
	}
}

const dataPrefix = "data:"

func (s *Scanner) feedEvents(b []byte) {
	for len(b) > 0 {
		line, rest, whole := bytes.Cut(b, []byte{'\n'})
		s.feedLine(line)
		if whole {
			s.line, s.inData, s.skip = s.line[:0], false, false
			s.picker.Reset()
		}
		b = rest
	}
}

func (s *Scanner) feedLine(b []byte) {
	for !s.inData && !s.skip && len(b) > 0 {
		s.line = append(s.line, b[0])
		b = b[1:]
		s.skip = !strings.HasPrefix(dataPrefix, string(s.line))
		s.inData = string(s.line) == dataPrefix
	}
	if s.inData {
		s.picker.Feed(b)
	}
}

func (s *Scanner) found(id int, value []byte, quoted bool) {
	what := members[id].what
	switch {
	case what >= 0 && !quoted:
		if n, err := strconv.Atoi(string(value)); err == nil && n >= 0 {
			s.note(number(what), n, strings.HasPrefix(members[id].path, "*."))
		}
	case !quoted:
	case what == isID:
		s.usage.ID = string(value)
	case what == isModel:
		s.usage.Model = string(value)
	case what == isFinish:
		s.finish(string(value))
	case what == isObject:
		s.inclusive = s.inclusive || string(value) == "response"
	}
}

// note a number. Several answers to one request are added.
func (s *Scanner) note(what number, n int, several bool) {
	if several && s.said[what] >= 0 {
		n += s.said[what]
	}
	s.said[what] = n
}

func (s *Scanner) finish(reason string) {
	for _, r := range reasons {
		if r == reason && len(s.usage.Finish) < maxFinish {
			s.usage.Finish = append(s.usage.Finish, r)
		}
	}
}

// Streamed says that the answer comes in pieces, as it is made.
func (s *Scanner) Streamed() bool { return s.streamed }

// Said is what the engine has said so far.
func (s *Scanner) Said() Usage {
	u, n := s.usage, s.said
	u.Processed = n[computed]
	u.Output, u.Cached, u.Input = first(n[predicted], n[output]), first(n[cachedT], n[cached]), n[input]
	switch {
	case n[computed] >= 0 && n[cachedT] >= 0:
		u.Input = n[computed] + n[cachedT]
	case u.Input < 0 && n[uncached] >= 0:
		u.Input = n[uncached]
		if !s.inclusive {
			u.Input += max(0, u.Cached)
		}
	}
	return u
}

func first(a, b int) int {
	if a >= 0 {
		return a
	}
	return b
}
