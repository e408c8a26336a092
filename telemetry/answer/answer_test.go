package answer

import (
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"testing"
)

const text = `{\"usage\":{\"prompt_tokens\":99}} canary`

func header(t string) http.Header { return http.Header{"Content-Type": {t}} }

func events(list ...string) string {
	return "data: " + strings.Join(list, "\n\ndata: ") + "\n\n"
}

func TestSaid(t *testing.T) {
	const timings = `"timings":{"cache_n":4,"prompt_n":30,"prompt_ms":3.6,"predicted_n":3,"predicted_ms":0.7}`
	for name, test := range map[string]struct {
		kind, body string
		want       Usage
	}{
		"chat, streamed": {"text/event-stream", events(`{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"`+text+`"}}],"id":"c-1","model":"m"}`,
			`{"choices":[{"finish_reason":"length","delta":{}}],"id":"c-1","model":"m",`+timings+`}`, "[DONE]"),
			Usage{Input: 34, Cached: 4, Output: 3, Processed: 30, ID: "c-1", Model: "m", Finish: []string{"length"}}},
		"chat, with usage, another engine": {"text/event-stream; charset=utf-8", events(`{"choices":[{"delta":{"content":"`+text+`"}}]}`, `{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}`, "[DONE]"),
			Usage{Input: 5, Cached: 1, Output: 2, Processed: -1}},
		"chat": {"application/json; charset=utf-8", `{"choices":[{"finish_reason":"stop","message":{"content":"` + text + `"}},{"finish_reason":"length"}],"usage":{"completion_tokens":3,"prompt_tokens":34},` + timings + `}`,
			Usage{Input: 34, Cached: 4, Output: 3, Processed: 30, Finish: []string{"stop", "length"}}},
		"llama.cpp, streamed": {"text/event-stream", events(`{"index":0,"content":"`+text+`","stop":false,"tokens_predicted":1,"tokens_evaluated":34}`, `{"content":"","stop":true,"prompt":"`+text+`","stop_type":"limit","tokens_predicted":3,"tokens_evaluated":34,`+timings+`}`),
			Usage{Input: 34, Cached: 4, Output: 3, Processed: 30, Finish: []string{"limit"}}},
		"llama.cpp, cut": {"text/event-stream", events(`{"content":"a","tokens_predicted":1,"tokens_evaluated":34}`) + `data: {"content":"b","tokens_predicted":2,"tok`,
			Usage{Input: 34, Cached: -1, Output: 2, Processed: -1}},
		"several answers": {"application/json", `[{"stop_type":"limit",` + timings + `},{"stop_type":"eos",` + timings + `}]`,
			Usage{Input: 68, Cached: 8, Output: 6, Processed: 60, Finish: []string{"limit", "eos"}}},
		"messages": {"text/event-stream", "event: message_start\n" + events(`{"type":"message_start","message":{"id":"m-1","model":"m","usage":{"cache_read_input_tokens":35,"input_tokens":1,"output_tokens":0}}}`) +
			"event: content_block_delta\n" + events(`{"delta":{"type":"text_delta","text":"`+text+`"}}`) +
			"event: message_delta\n" + events(`{"type":"message_delta","delta":{"stop_reason":"max_tokens"},"usage":{"output_tokens":3}}`),
			Usage{Input: 36, Cached: 35, Output: 3, Processed: -1, ID: "m-1", Model: "m", Finish: []string{"max_tokens"}}},
		"responses": {"text/event-stream", events(`{"type":"response.completed","response":{"id":"r-1","object":"response","model":"m","usage":{"input_tokens":36,"output_tokens":3,"input_tokens_details":{"cached_tokens":35}}}}`),
			Usage{Input: 36, Cached: 35, Output: 3, Processed: -1, ID: "r-1", Model: "m"}},
		"responses, whole": {"application/json", `{"id":"r-1","object":"response","usage":{"input_tokens":36,"output_tokens":3,"input_tokens_details":{"cached_tokens":35}}}`,
			Usage{Input: 36, Cached: 35, Output: 3, Processed: -1, ID: "r-1"}},
		"Ollama": {"application/x-ndjson", `{"model":"m","response":"` + text + `","done":false}` + "\n" + `{"model":"m","response":"","done":true,"done_reason":"stop","prompt_eval_count":12,"eval_count":5}` + "\n",
			Usage{Input: 12, Cached: -1, Output: 5, Processed: -1, Model: "m", Finish: []string{"stop"}}},
		"reasons are words that are known": {"application/json", `{"choices":[{"finish_reason":"canary"}]}`, Usage{Input: -1, Cached: -1, Output: -1, Processed: -1}},
		"some other text":                  {"text/html", `{"usage":{"prompt_tokens":5}}`, Usage{Input: -1, Cached: -1, Output: -1, Processed: -1}},
		"carriage returns":                 {"text/event-stream", strings.ReplaceAll(events(`{"tokens_predicted":1}`, `{"tokens_predicted":2}`), "\n", "\r\n"), Usage{Input: -1, Cached: -1, Output: 2, Processed: -1}},
	} {
		for _, piece := range []int{1, 7, 1 << 20} {
			t.Run(fmt.Sprint(name, " ", piece), func(t *testing.T) {
				s := New(header(test.kind))
				for rest := test.body; len(rest) > 0; {
					n := min(piece, len(rest))
					s.Feed([]byte(rest[:n]))
					rest = rest[n:]
				}
				if got := s.Said(); !reflect.DeepEqual(got, test.want) {
					t.Errorf("%+v, want %+v", got, test.want)
				}
			})
		}
	}
}

func TestEncodedAnswersAreLeftAlone(t *testing.T) {
	h := header("application/json")
	h.Set("Content-Encoding", "br")
	s := New(h)
	s.Feed([]byte(`{"eval_count":3}`))
	if s.Said().Output != -1 {
		t.Errorf("%+v", s.Said())
	}
}

// No text of the answer is kept, wherever it stands.
func FuzzNothingIsKept(f *testing.F) {
	f.Add("canary", true)
	f.Fuzz(func(t *testing.T, content string, stream bool) {
		quoted, _ := json.Marshal(content + " canary")
		body := fmt.Sprintf(`{"choices":[{"delta":{"content":%s},"finish_reason":%s}],"content":%s,"response":%s,"message":{"content":%s}}`, quoted, quoted, quoted, quoted, quoted)
		s := New(header("application/json"))
		if stream {
			s, body = New(header("text/event-stream")), events(body)
		}
		s.Feed([]byte(body))
		if said := fmt.Sprintf("%+v", s.Said()); strings.Contains(said, "canary") {
			t.Error(said)
		}
	})
}
