package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/kvshield/kvshield/internal/collector"
)

// receiver of spans and metrics, and the environment in which kvshield sends them soon.
func receiver(t *testing.T, protocol string) (r *collector.Receiver, flags, env []string) {
	t.Helper()
	r, err := collector.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	url := map[string]string{"grpc": r.GRPC, "http/protobuf": r.HTTP}[protocol]
	return r, []string{"--otlp", url}, []string{"OTEL_EXPORTER_OTLP_PROTOCOL=" + protocol, "OTEL_BSP_SCHEDULE_DELAY=50", "OTEL_METRIC_EXPORT_INTERVAL=200"}
}

// traced is a request with a trace of the client's, and what the engine counted for it.
type traced struct {
	path, key string
	request   map[string]any
	stream    bool

	trace   string
	status  int
	echoed  string // header
	timings timings
	content string
}

type timings struct {
	CacheN     int `json:"cache_n"`
	PromptN    int `json:"prompt_n"`
	PredictedN int `json:"predicted_n"`
}

func (q *traced) ask(s *server, number int) error {
	q.trace = fmt.Sprintf("0af7651916cd43dd8448eb211c8031%02x", number)
	q.request["stream"] = q.stream
	body, err := json.Marshal(q.request)
	if err != nil {
		return err
	}
	r, err := http.NewRequest("POST", s.url+q.path, strings.NewReader(string(body)))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Traceparent", "00-"+q.trace+"-b7ad6b7169203331-01")
	if q.key != "" {
		r.Header.Set("Authorization", "Bearer "+q.key)
	}
	resp, err := s.client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	q.status, q.echoed = resp.StatusCode, resp.Header.Get("Traceresponse")
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	return q.read(text)
}

// read takes an answer apart: lines of a stream, or one object.
func (q *traced) read(text []byte) error {
	for line := range strings.Lines(string(text)) {
		line = strings.TrimPrefix(strings.TrimSpace(line), "data: ")
		var a struct {
			Timings *timings
			Content string
			Choices []struct {
				Text           string
				Delta, Message struct{ Content string }
			}
		}
		if line == "" || line == "[DONE]" || strings.HasPrefix(line, "event:") {
			continue
		}
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			return fmt.Errorf("%w in %s", err, line)
		}
		if a.Timings != nil {
			q.timings = *a.Timings
		}
		q.content += a.Content
		for _, c := range a.Choices {
			q.content += c.Text + c.Delta.Content + c.Message.Content
		}
	}
	return nil
}

// spansOf are those of one trace, by name.
func spansOf(list []collector.Span, trace string) map[string][]collector.Span {
	m := map[string][]collector.Span{}
	for _, s := range list {
		if s.Trace == trace {
			m[s.Name] = append(m[s.Name], s)
		}
	}
	return m
}

// threeAtOnce are requests of three kinds, of different lengths.
func threeAtOnce() []*traced {
	return []*traced{
		{path: "/v1/chat/completions", key: "sk-alice-000", stream: true, request: map[string]any{"messages": []any{map[string]any{"role": "user", "content": strings.Join(prompts, " ")}}, "max_tokens": 40, "ignore_eos": true, "temperature": 0.5}},
		{path: "/completion", key: "sk-bob-00000", request: map[string]any{"prompt": prompts[2], "n_predict": 60, "ignore_eos": true}},
		{path: "/v1/completions", key: "sk-carol-000", stream: true, request: map[string]any{"prompt": strings.Repeat(prompts[4]+" ", 12), "max_tokens": 25, "ignore_eos": true}},
	}
}

// Every transition of requests that are decoded together belongs to the right one, by the engine's own counts.
func TestTransitionsBelongToTheirRequests(t *testing.T) {
	for name, flags := range map[string][]string{"keys": {"--api-key-file", keyFile(t)}, "no keys": nil} {
		inEachMode(t, func(t *testing.T, mode string) {
			t.Run(name, func(t *testing.T) { testTransitions(t, mode, flags) })
		})
	}
}

func testTransitions(t *testing.T, mode string, flags []string) {
	got, otlp, env := receiver(t, "grpc")
	s := startShielded(t, serveOptions{model: demoModel, mode: mode, env: env, flags: append(otlp, flags...), args: []string{"-np", "3", "-c", "3072"}})
	list := threeAtOnce()
	var wg sync.WaitGroup
	for i, q := range list {
		wg.Go(func() {
			if err := q.ask(s, i); err != nil || q.status != http.StatusOK {
				t.Errorf("%s: %d, %v", q.path, q.status, err)
			}
		})
	}
	wg.Wait()
	whole := func(spans []collector.Span) bool {
		for _, q := range list {
			if m := spansOf(spans, q.trace); len(m["queue"]) != 1 || len(m["prefill"]) != 1 || len(m["decode"]) != 1 || len(m) != 4 {
				return false
			}
		}
		return true
	}
	if !got.Await(patience, whole) {
		t.Fatalf("not all spans came: %+v\n%s", got.Spans(), s.log)
	}
	var together int64
	for _, q := range list {
		together += q.check(t, mode, got.Spans())
	}
	s.checkTotals(t, list, together)
}

// perGraph is how many transitions a graph of the demo model has: one for each layer, and in mode resident one for the batch.
var perGraph = map[string]int64{"resident": demoLayers + 1, "permute": demoLayers}

const demoLayers = 5

// check one request's spans, and return its transitions.
func (q *traced) check(t *testing.T, mode string, all []collector.Span) int64 {
	t.Helper()
	spans := spansOf(all, q.trace)
	var request collector.Span
	for name, list := range spans {
		if strings.HasSuffix(name, " demo.gguf") {
			request = list[0]
		}
	}
	prefill, decode := spans["prefill"][0], spans["decode"][0]
	n := func(s collector.Span, key string) int64 { v, _ := s.Attributes[key].(int64); return v }
	if request.Kind != tracepb.Span_SPAN_KIND_SERVER || request.Parent != "b7ad6b7169203331" || len(request.Links) != 1 || request.Attributes["gen_ai.provider.name"] != "llama.cpp" {
		t.Errorf("%s: %+v", q.path, request)
	}
	if q.echoed != "00-"+q.trace+"-"+request.ID+"-01" {
		t.Errorf("%s: the answer says %q of its span %s", q.path, q.echoed, request.ID)
	}
	for _, child := range []collector.Span{spans["queue"][0], prefill, decode} {
		if child.Parent != request.ID || child.Start.Before(request.Start) || child.End.After(request.End) || child.End.Before(child.Start) {
			t.Errorf("%s: %s is from %v to %v below %s, the request from %v to %v", q.path, child.Name, child.Start, child.End, child.Parent, request.Start, request.End)
		}
	}
	if got := n(prefill, "kvshield.tokens"); got != int64(q.timings.PromptN) || got == 0 {
		t.Errorf("%s: prefill of %d tokens, the engine says %d", q.path, got, q.timings.PromptN)
	}
	// The last token that is sampled is not computed any more.
	if got := n(decode, "kvshield.tokens"); got != int64(q.timings.PredictedN-1) || len(decode.Events) != int(got) {
		t.Errorf("%s: %d tokens decoded with %d events, the engine says %d", q.path, got, len(decode.Events), q.timings.PredictedN-1)
	}
	for _, s := range []collector.Span{prefill, decode} {
		if got := n(s, "kvshield.transitions"); got != perGraph[mode]*n(s, "kvshield.graphs") || got == 0 {
			t.Errorf("%s: %d transitions in %d graphs", q.path, got, n(s, "kvshield.graphs"))
		}
	}
	for _, e := range decode.Events {
		if share, _ := e.Attributes["kvshield.enclave.share"].(float64); e.Name != "token" || e.Attributes["kvshield.transitions"] != perGraph[mode] || share <= 0 || share > 1 {
			t.Errorf("%s: %+v", q.path, e)
		}
	}
	for key, want := range map[string]int{"gen_ai.usage.input_tokens": q.timings.PromptN + q.timings.CacheN, "gen_ai.usage.output_tokens": q.timings.PredictedN} {
		if n(request, key) != int64(want) {
			t.Errorf("%s: %s is %v, the engine says %d", q.path, key, request.Attributes[key], want)
		}
	}
	return n(request, "kvshield.transitions")
}

// checkTotals compares what was booked with what the engine's hook counted in all.
func (s *server) checkTotals(t *testing.T, list []*traced, together int64) {
	t.Helper()
	key := list[0].key
	var status struct{ Transitions struct{ Count float64 } }
	if err := json.Unmarshal([]byte(s.page(t, "/kvshield/status", key)), &status); err != nil {
		t.Fatal(err)
	}
	text := s.page(t, "/kvshield/metrics", key)
	byPhase := map[string]float64{}
	var sum float64
	for _, phase := range []string{"prefill", "decode", "unknown"} {
		byPhase[phase] = sampled(text, "kvshield_transitions_total", `kvshield_phase="`+phase+`"`)
		sum += byPhase[phase]
	}
	if sum != status.Transitions.Count || sum != sampled(text, "kvshield_transition_duration_seconds_count") {
		t.Errorf("%v transitions were booked, the engine counted %v", byPhase, status.Transitions.Count)
	}
	if lost := sampled(text, "kvshield_graphs_lost_total"); lost != 0 {
		t.Errorf("%v graphs were lost", lost)
	}
	// A graph of several requests counts for each of them.
	if ours := int64(byPhase["prefill"] + byPhase["decode"]); together < ours {
		t.Errorf("the requests had %d transitions, their graphs %d", together, ours)
	}
	var decoded, in int
	for _, q := range list {
		decoded += q.timings.PredictedN - 1
		in += q.timings.PromptN
	}
	if got := sampled(text, "kvshield_token_transitions_count"); got != float64(decoded) {
		t.Errorf("%v decoded tokens were measured, the engine says %d", got, decoded)
	}
}

func (s *server) page(t *testing.T, path, key string) string {
	t.Helper()
	r, err := http.NewRequest("GET", s.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if key != "" {
		r.Header.Set("X-Api-Key", key)
	}
	resp, err := s.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v", path, resp.Status, err)
	}
	return string(text)
}

// sampled is the sum of a metric's samples whose labels have all the given texts.
func sampled(text, name string, labels ...string) float64 {
	var sum float64
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest[0] != '{' && rest[0] != ' ' {
			continue
		}
		set, value, _ := strings.Cut(rest, " ")
		if at := strings.LastIndex(rest, "} "); at >= 0 {
			set, value = rest[:at], rest[at+2:]
		}
		has := true
		for _, l := range labels {
			has = has && strings.Contains(set, l)
		}
		var v float64
		if _, err := fmt.Sscan(value, &v); err == nil && has {
			sum += v
		}
	}
	return sum
}
