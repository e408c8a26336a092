package e2e

import (
	"cmp"
	"encoding/json"
	"os"
	"slices"
	"strconv"
	"testing"
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
	servers := []*server{
		startShielded(t, serveOptions{model: model, flags: []string{"--telemetry=false"}, args: []string{"-np", "1", "-c", "512"}}),
		startShielded(t, serveOptions{model: model, flags: flags, env: env, args: []string{"-np", "1", "-c", "512"}}),
	}
	var ratios []float64
	for i := -1; i < pairs; i++ { // the first pair warms up
		var rates [2]float64
		for turn := range servers {
			which := (turn + i + 2) % 2 // neither is always the first
			rates[which] = servers[which].decodeRate(t)
		}
		if i >= 0 {
			ratios = append(ratios, rates[1]/rates[0])
			t.Logf("pair %d: off %.2f, on %.2f tokens/s, ratio %.4f", i+1, rates[0], rates[1], rates[1]/rates[0])
		}
	}
	slices.Sort(ratios)
	n := len(ratios)
	t.Logf("on / off, %d pairs: median %.4f, quartiles %.4f %.4f, min %.4f, max %.4f", n, (ratios[(n-1)/2]+ratios[n/2])/2, ratios[n/4], ratios[n-1-n/4], ratios[0], ratios[n-1])
}

// decodeRate is what the engine itself says of one answer.
func (s *server) decodeRate(t *testing.T) float64 {
	t.Helper()
	body, err := s.post("/completion", map[string]any{"prompt": prompts[0], "n_predict": overheadTokens, "ignore_eos": true, "temperature": 0, "cache_prompt": false})
	var a struct {
		Timings struct {
			Rate float64 `json:"predicted_per_second"`
		}
	}
	if err == nil {
		err = json.Unmarshal(body, &a)
	}
	if err != nil || a.Timings.Rate == 0 {
		t.Fatalf("%v\n%s", err, s.log)
	}
	return a.Timings.Rate
}
