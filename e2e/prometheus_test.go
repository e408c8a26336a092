package e2e

import (
	"net/http"
	"net/url"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// A real Prometheus reads what a run exports, finds nothing to complain of, and leads from a figure to its trace.
func TestPrometheusReadsARun(t *testing.T) {
	program, promtool := tool(t, "prometheus"), tool(t, "promtool")
	got, flags, env := receiver(t, "grpc")
	s := startShielded(t, serveOptions{model: demoModel, env: env, flags: flags, args: []string{"-np", "2"}})
	prom := startPrometheus(t, program, strings.TrimPrefix(s.url, "http://"))
	q := &traced{path: "/completion", request: map[string]any{"prompt": prompts[1], "n_predict": 20, "ignore_eos": true}}
	if err := q.ask(s, 0); err != nil || q.status != http.StatusOK {
		t.Fatal(q.status, err)
	}
	text := s.page(t, "/kvshield/metrics", "")
	check := exec.Command(promtool, "check", "metrics")
	check.Stdin = strings.NewReader(text)
	if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool: %v\n%s", err, out)
	}
	want := map[string]float64{
		`sum(kvshield_transitions_total)`:                                       sampled(text, "kvshield_transitions_total"),
		`sum(kvshield_token_transitions_count)`:                                 float64(q.timings.PredictedN - 1),
		`sum(gen_ai_client_token_usage_sum{gen_ai_token_type="input"})`:         float64(q.timings.PromptN + q.timings.CacheN),
		`kvshield_info{kvshield_mode="resident",kvshield_tee_hardware="false"}`: 1,
		`sum(kvshield_requests_active)`:                                         0,
	}
	for expr, v := range want {
		var last float64
		var err error
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
			if last, err = prom.value(expr); err == nil && last == v {
				break
			}
		}
		if err != nil || last != v {
			t.Errorf("%s is %v (%v), want %v", expr, last, err, v)
		}
	}
	var data []struct {
		Exemplars []struct {
			Labels struct {
				Trace string `json:"trace_id"`
				Span  string `json:"span_id"`
			}
		}
	}
	query := url.Values{"query": {"kvshield_token_enclave_share_bucket"}, "start": {time.Now().Add(-time.Hour).Format(time.RFC3339)}, "end": {time.Now().Add(time.Hour).Format(time.RFC3339)}}
	if err := prom.get("/api/v1/query_exemplars", query, &data); err != nil || len(data) == 0 || len(data[0].Exemplars) == 0 {
		t.Fatalf("no exemplar: %v, %+v\n%s", err, data, prom.log)
	}
	at := data[0].Exemplars[0].Labels
	for _, span := range got.Spans() {
		if span.Trace == q.trace && span.ID == at.Span && at.Trace == q.trace {
			return
		}
	}
	t.Errorf("the exemplar leads to span %s of trace %s, which nobody sent", at.Span, at.Trace)
}
