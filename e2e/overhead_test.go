package e2e

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"
)

const overheadTokens = 128 // decoded in one answer

// What telemetry costs: decode with it, a receiver included, and without, in turns. KVSHIELD_OVERHEAD is how many pairs of answers, KVSHIELD_OVERHEAD_MODEL
// which model; the result is reported and not judged.
func TestTelemetryOverhead(t *testing.T) {
	pairs, err := strconv.Atoi(os.Getenv("KVSHIELD_OVERHEAD"))
	if err != nil {
		t.Skip("KVSHIELD_OVERHEAD is not set: make telemetry-overhead")
	}
	model := cmp.Or(os.Getenv("KVSHIELD_OVERHEAD_MODEL"), demoModel)
	_, flags, env := receiver(t, "grpc")
	env = env[:1] // the rest has it send more often than anybody would
	servers := []*server{
		startShielded(t, serveOptions{model: model, flags: []string{"--telemetry=false"}, args: []string{"-np", "1", "-c", "512"}}),
		startShielded(t, serveOptions{model: model, flags: flags, env: env, args: []string{"-np", "1", "-c", "512"}}),
	}
	var ratios []float64
	var busy [2]time.Duration
	for i := -1; i < pairs; i++ { // the first pair warms up
		var rates [2]float64
		for turn := range servers {
			which := (turn + i + 2) % 2 // neither is always the first
			before := servers[which].onCPU(t)
			rates[which] = servers[which].decodeRate(t)
			if i >= 0 {
				busy[which] += servers[which].onCPU(t) - before
			}
		}
		if i >= 0 {
			ratios = append(ratios, rates[1]/rates[0])
			t.Logf("pair %d: off %.2f, on %.2f tokens/s, ratio %.4f", i+1, rates[0], rates[1], rates[1]/rates[0])
		}
	}
	slices.Sort(ratios)
	n := len(ratios)
	t.Logf("on / off, %d pairs: median %.4f, quartiles %.4f %.4f, min %.4f, max %.4f", n, (ratios[(n-1)/2]+ratios[n/2])/2, ratios[n/4], ratios[n-1-n/4], ratios[0], ratios[n-1])
	each := func(d time.Duration) time.Duration { return d / time.Duration(n*overheadTokens) }
	t.Logf("processor time of kvshield serve for a token: off %v, on %v", each(busy[0]), each(busy[1]))
}

// decodeRate is what the engine itself says of one streamed answer.
func (s *server) decodeRate(t *testing.T) float64 {
	t.Helper()
	q := &traced{path: "/completion", stream: true, request: map[string]any{"prompt": prompts[0], "n_predict": overheadTokens, "ignore_eos": true, "temperature": 0, "cache_prompt": false}}
	if err := q.ask(s, 0); err != nil || q.timings.PredictedRate == 0 {
		t.Fatalf("%d, %v\n%s", q.status, err, s.log)
	}
	return q.timings.PredictedRate
}

// onCPU is for how long the threads of kvshield serve have run: unlike rates, it says something on a busy machine too.
func (s *server) onCPU(t *testing.T) time.Duration {
	t.Helper()
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", s.cmd.Process.Pid))
	var sum time.Duration
	for _, f := range files {
		var ns int64
		if text, err := os.ReadFile(f); err == nil {
			fmt.Sscan(string(text), &ns)
		}
		sum += time.Duration(ns)
	}
	if sum == 0 {
		t.Fatal("the kernel does not say how long the threads of kvshield serve ran")
	}
	return sum
}
