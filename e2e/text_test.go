package e2e

import (
	"fmt"
	"math"
	"slices"
	"testing"
)

const tokens = 200

// same fails the test where shielded answers to the prompts are not the stock ones.
func same(t *testing.T, stock, shielded []completion) {
	t.Helper()
	for i := range stock {
		if len(stock[i].Tokens) < tokens {
			t.Errorf("prompt %d: stock gave %d tokens, %d were asked for", i, len(stock[i].Tokens), tokens)
		}
		sameText(t, fmt.Sprintf("prompt %d (%q)", i, prompts[i]), stock[i], shielded[i])
	}
}

// vocabulary of the demo model.
const vocabulary = 1024

// sameLogits compares the logits of every token with the stock engine's, over the whole vocabulary. Log-probabilities are
// logits up to a constant, which is taken out. A token's difference is the relative L2 distance; its median over the
// tokens must stay below 1e-3. The largest is reported, not asserted: where a sum that was taken in another order falls
// on the other side of an F16 rounding, stock with flash attention and stock without it differ as much.
func sameLogits(t *testing.T, stock, shielded completion) {
	t.Helper()
	if len(stock.Probs) != tokens || len(shielded.Probs) != tokens {
		t.Fatalf("probabilities for %d and %d tokens", len(stock.Probs), len(shielded.Probs))
	}
	var differences []float64
	for i := range stock.Probs {
		differences = append(differences, distance(logits(t, stock, i), logits(t, shielded, i)))
	}
	slices.Sort(differences)
	median, worst := differences[len(differences)/2], differences[len(differences)-1]
	t.Logf("logits differ by %.1e relative (median of %d tokens), %.1e at most", median, tokens, worst)
	if median > 1e-3 {
		t.Errorf("logits differ by %.1e relative", median)
	}
}

// sameFirstLogits compares the logits of the first token after each prompt.
func sameFirstLogits(t *testing.T, stock, shielded *server, bound float64) {
	t.Helper()
	all := map[string]any{"n_probs": vocabulary}
	worst := 0.0
	for _, prompt := range prompts {
		want, got := stock.complete(t, prompt, 1, all), shielded.complete(t, prompt, 1, all)
		worst = max(worst, distance(logits(t, want, 0), logits(t, got, 0)))
	}
	t.Logf("logits of first tokens differ by %.1e relative at most", worst)
	if !(worst <= bound) {
		t.Errorf("logits of first tokens differ by %.1e relative", worst)
	}
}

// logits of token i, centred, by token id.
func logits(t *testing.T, c completion, i int) []float64 {
	t.Helper()
	out := make([]float64, vocabulary)
	mean := 0.0
	if len(c.Probs[i].Top) != vocabulary {
		t.Fatalf("token %d: %d candidates, the vocabulary has %d", i, len(c.Probs[i].Top), vocabulary)
	}
	for _, p := range c.Probs[i].Top {
		out[p.ID] = p.LogProb
		mean += p.LogProb / vocabulary
	}
	for i := range out {
		out[i] -= mean
	}
	return out
}

func distance(want, got []float64) float64 {
	var difference, size float64
	for i := range want {
		difference += (got[i] - want[i]) * (got[i] - want[i])
		size += want[i] * want[i]
	}
	return math.Sqrt(difference / size)
}

func TestTextEqualsStock(t *testing.T) {
	onVulkan := []string{"-ngl", "99", "-dev", "Vulkan0"}
	tests := map[string]struct {
		vulkan bool
		flags  []string
		args   []string
	}{
		"cpu, flash attention on":   {args: []string{"-fa", "on"}},
		"cpu, flash attention off":  {args: []string{"-fa", "off"}},
		"cpu, socket data plane":    {flags: []string{"--data-plane", "socket"}},
		"cpu, small frames":         {flags: []string{"--data-plane-bytes", "4096"}},
		"cpu, no memory mapping":    {args: []string{"--load-mode", "none"}},
		"cpu, direct I/O":           {args: []string{"--load-mode", "dio"}},
		"vulkan device":             {vulkan: true, args: onVulkan},
		"vulkan, flash off":         {vulkan: true, args: append([]string{"-fa", "off"}, onVulkan...)},
		"vulkan, cache on the host": {vulkan: true, args: append([]string{"--no-kv-offload"}, onVulkan...)},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var env []string
			if test.vulkan {
				env = vulkan(t)
			}
			stock := startStock(t, demoModel, env, test.args...)
			want := stock.completeAll(t, tokens, 1, nil)
			all := map[string]any{"n_probs": vocabulary}
			probabilities := stock.complete(t, prompts[0], tokens, all)
			inEachMode(t, func(t *testing.T, mode string) {
				shielded := startShielded(t, serveOptions{model: demoModel, mode: mode, env: env, flags: test.flags, args: test.args})
				same(t, want, shielded.completeAll(t, tokens, 1, nil))
				sameLogits(t, probabilities, shielded.complete(t, prompts[0], tokens, all))
			})
		})
	}
}

// Batches of several slots are cut differently from run to run, so that even two stock runs may differ in the last bit of
// a sum; the demo model's greedy text has been the same in all.
func TestTextEqualsStockInParallelSlots(t *testing.T) {
	args := []string{"-np", "4", "-c", "4096"}
	stock := startStock(t, demoModel, nil, args...)
	want := stock.completeAll(t, tokens, 1, nil)
	inEachMode(t, func(t *testing.T, mode string) {
		shielded := startShielded(t, serveOptions{model: demoModel, mode: mode, args: args})
		same(t, want, shielded.completeAll(t, tokens, 4, nil))
	})
}

func TestTextEqualsStockAcrossContextShift(t *testing.T) {
	args := []string{"-c", "128", "-np", "1", "--context-shift", "-fit", "off"}
	stock := startStock(t, demoModel, nil, args...)
	want := stock.completeAll(t, tokens, 1, nil)
	inEachMode(t, func(t *testing.T, mode string) {
		shielded := startShielded(t, serveOptions{model: demoModel, mode: mode, args: args})
		same(t, want, shielded.completeAll(t, tokens, 1, nil))
	})
}

// A quantised cache rounds permuted rows in other blocks, and the enclave rounds otherwise than the engine, so the texts need not be equal; how far they
// agree is reported.
func TestQuantisedCacheAgrees(t *testing.T) {
	args := []string{"-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"}
	stock := startStock(t, demoModel, nil, args...)
	want := stock.completeAll(t, tokens, 1, nil)
	inEachMode(t, func(t *testing.T, mode string) {
		shielded := startShielded(t, serveOptions{model: demoModel, mode: mode, args: args})
		agrees(t, want, shielded.completeAll(t, tokens, 1, nil))
	})
}

// agrees reports how far rounded answers agree, and fails where that is not rounding any more.
func agrees(t *testing.T, want, got []completion) {
	t.Helper()
	agree, all := 0, 0
	for i := range want {
		all += len(want[i].Tokens)
		for j, token := range want[i].Tokens {
			if j == len(got[i].Tokens) || got[i].Tokens[j] != token {
				break
			}
			agree++
		}
	}
	t.Logf("q8_0 cache: %d of %d tokens agree before the first difference of each prompt", agree, all)
	if agree < all/4 {
		t.Errorf("only %d of %d tokens agree: that is not rounding", agree, all)
	}
}
