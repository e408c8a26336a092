package e2e

import (
	"math"
	"testing"
)

const tokens = 200

// same fails the test where a shielded answer is not the stock one, byte for byte.
func same(t *testing.T, stock, shielded []completion) {
	t.Helper()
	for i := range stock {
		if len(stock[i].Tokens) < tokens {
			t.Errorf("prompt %d: stock gave %d tokens, %d were asked for", i, len(stock[i].Tokens), tokens)
		}
		if shielded[i].Content != stock[i].Content {
			t.Errorf("prompt %d (%q):\nstock:    %q\nshielded: %q", i, prompts[i], stock[i].Content, shielded[i].Content)
		}
	}
}

// sameProbabilities compares the logits' probabilities of the first tokens, to 1e-3 relative.
func sameProbabilities(t *testing.T, stock, shielded completion) {
	t.Helper()
	if len(stock.Probs) == 0 || len(stock.Probs) != len(shielded.Probs) {
		t.Fatalf("probabilities for %d and %d tokens", len(stock.Probs), len(shielded.Probs))
	}
	worst := 0.0
	for i := range stock.Probs {
		theirs := map[int]float64{}
		for _, p := range shielded.Probs[i].Top {
			theirs[p.ID] = p.LogProb
		}
		for _, p := range stock.Probs[i].Top[:5] {
			got, ok := theirs[p.ID]
			if !ok {
				t.Fatalf("token %d: stock's candidate %d is not among the shielded ones", i, p.ID)
			}
			worst = max(worst, math.Abs(got-p.LogProb)/max(1e-3, math.Abs(p.LogProb)))
		}
	}
	t.Logf("largest relative difference of a log-probability: %.2g", worst)
	if worst > 1e-3 {
		t.Errorf("log-probabilities differ by %.2g relative", worst)
	}
}

func TestTextEqualsStock(t *testing.T) {
	onVulkan := []string{"-ngl", "99", "-dev", "Vulkan0"}
	tests := map[string]struct {
		vulkan   bool
		flags    []string
		args     []string
		parallel int
	}{
		"cpu, flash attention on":   {args: []string{"-fa", "on"}, parallel: 1},
		"cpu, flash attention off":  {args: []string{"-fa", "off"}, parallel: 1},
		"cpu, socket data plane":    {flags: []string{"--data-plane", "socket"}, parallel: 1},
		"cpu, small frames":         {flags: []string{"--data-plane-bytes", "4096"}, parallel: 1},
		"cpu, no memory mapping":    {args: []string{"--load-mode", "none"}, parallel: 1},
		"cpu, direct I/O":           {args: []string{"--load-mode", "dio"}, parallel: 1},
		"vulkan device":             {vulkan: true, args: onVulkan, parallel: 1},
		"vulkan, flash off":         {vulkan: true, args: append([]string{"-fa", "off"}, onVulkan...), parallel: 1},
		"vulkan, cache on the host": {vulkan: true, args: append([]string{"--no-kv-offload"}, onVulkan...), parallel: 1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var env []string
			if test.vulkan {
				env = vulkan(t)
			}
			more := map[string]any{"n_probs": 10}
			stock := startStock(t, demoModel, env, test.args...)
			want := stock.completeAll(t, tokens, test.parallel, more)
			shielded := startShielded(t, serveOptions{model: demoModel, env: env, flags: test.flags, args: test.args})
			got := shielded.completeAll(t, tokens, test.parallel, more)
			same(t, want, got)
			for i := range want {
				sameProbabilities(t, want[i], got[i])
			}
		})
	}
}

// Batches of several slots are cut differently from run to run, so that even two stock runs may differ in the last bit of
// a sum; the demo model's greedy text has been the same in all.
func TestTextEqualsStockInParallelSlots(t *testing.T) {
	args := []string{"-np", "4", "-c", "4096"}
	stock := startStock(t, demoModel, nil, args...)
	want := stock.completeAll(t, tokens, 1, nil)
	shielded := startShielded(t, serveOptions{model: demoModel, args: args})
	same(t, want, shielded.completeAll(t, tokens, 4, nil))
}

func TestTextEqualsStockAcrossContextShift(t *testing.T) {
	args := []string{"-c", "128", "-np", "1", "--context-shift", "-fit", "off"}
	stock := startStock(t, demoModel, nil, args...)
	want := stock.completeAll(t, tokens, 1, nil)
	shielded := startShielded(t, serveOptions{model: demoModel, args: args})
	same(t, want, shielded.completeAll(t, tokens, 1, nil))
}

// A quantised cache rounds permuted rows in other blocks, so the texts need not be equal; how far they agree is reported.
func TestQuantisedCacheAgrees(t *testing.T) {
	args := []string{"-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"}
	stock := startStock(t, demoModel, nil, args...)
	want := stock.completeAll(t, tokens, 1, nil)
	shielded := startShielded(t, serveOptions{model: demoModel, args: args})
	got := shielded.completeAll(t, tokens, 1, nil)
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
