package e2e

import (
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
)

// way is a way of running each architecture.
type way struct {
	name       string
	args, twin []string
	bound      float64
	vulkan     bool
	shift      bool // past the end of the context
	// quick is for which models of the short run; nil is for all of them.
	quick []string
}

func (w way) env(t *testing.T) []string {
	if !w.vulkan {
		return nil
	}
	return vulkan(t)
}

var (
	common     = []string{"-c", "1024", "-np", "1", "--no-warmup"}
	device     = append(slices.Clone(common), "-ngl", "99", "-dev", "Vulkan0")
	exactCache = []string{"-ctk", "f32", "-ctv", "f32"}
	shifted    = slices.Concat([]string{"-c", "256", "-np", "1", "--no-warmup", "--context-shift"}, exactCache)
)

// archWays are the ways of running each architecture. With an F32 cache nothing is rounded on its way into the cache, so logits must
// be the same but for the order of sums. The bounds of the others leave room for F16. twin is another way of running the stock
// engine, on the CPU for Vulkan's: where it differs from itself by more (experts chosen at a near tie, deep models), twice that is the bound.
var archWays = []way{
	{name: "F32 cache", args: slices.Concat(common, exactCache, []string{"-fa", "off"}), twin: slices.Concat(common, exactCache, []string{"-fa", "on"}), bound: 1e-3},
	{name: "flash on", args: slices.Concat(common, []string{"-fa", "on"}), twin: slices.Concat(common, []string{"-fa", "off"}), bound: 5e-3, quick: families},
	{name: "flash off", args: slices.Concat(common, []string{"-fa", "off"}), twin: slices.Concat(common, []string{"-fa", "on"}), bound: 5e-3, quick: strings.Fields("llama qwen3moe gemma2 gemma3n mpt deepseek2")},
	{name: "shift", args: slices.Concat(shifted, []string{"-fa", "off"}), twin: slices.Concat(shifted, []string{"-fa", "on"}), bound: 1e-3, shift: true, quick: strings.Fields("llama qwen3 phi3 gpt2 gpt-oss gemma3 deepseek2 mpt")},
	{name: "Vulkan", args: slices.Concat(device, []string{"-fa", "on"}), twin: slices.Concat(common, []string{"-fa", "on"}), bound: 5e-3, vulkan: true,
		quick: strings.Fields("qwen3 phi3 gpt-oss gemma3 deepseek2")},
}

// question is a prompt and how many tokens to go on for.
type question struct {
	prompt string
	tokens int
}

func (w way) questions(long string) []question {
	if w.shift {
		return []question{{archPrompts[2], 250}}
	}
	var list []question
	for _, p := range append(archPrompts, long) {
		list = append(list, question{p, archTokens})
	}
	return list
}

// stockSays keeps what the stock engine answered to a model.
type stockSays struct {
	model string
	known map[string]answers
}

func (k *stockSays) answers(t *testing.T, w way, args []string, ask []question) (answers, error) {
	t.Helper()
	key := strings.Join(args, " ")
	if a, ok := k.known[key]; ok {
		return a, nil
	}
	s, err := tryStock(t, k.model, w.env(t), args...)
	if err != nil {
		return answers{}, err
	}
	defer s.stop()
	a, err := s.tryAnswers(ask)
	if err == nil {
		k.known[key] = a
	}
	return a, err
}

// ask returns what the stock engine says in a way.
func (k *stockSays) ask(t *testing.T, w way, ask []question) (answers, error) {
	t.Helper()
	want, err := k.answers(t, w, w.args, ask)
	switch {
	case err != nil:
		return want, err
	case math.IsNaN(compare(t, want, want, 0, 0).worst):
		return want, errors.New("the stock engine's logits are no numbers")
	case w.shift && !want.texts[0].Truncated:
		return want, errors.New("the stock engine does not shift this context")
	}
	return want, nil
}

// spread is how far the stock engine is from itself: its twin from what it wants.
func (k *stockSays) spread(t *testing.T, w way, ask []question, want answers) (own outcome) {
	t.Helper()
	other, err := k.answers(t, w, w.twin, ask)
	if err != nil {
		return own // without flash attention, say: then there is nothing to compare with
	}
	own = compare(t, want, other, math.Inf(1), math.Inf(1))
	if math.IsInf(own.parted, 1) { // by how much is not known: that allows nothing
		own.parted = 0
	}
	return own
}

// judge compares what a shielded engine said with what the stock engine did. Only where that is not close enough the stock engine is
// asked how far it is from itself.
func (k *stockSays) judge(t *testing.T, w way, ask []question, want, got answers) outcome {
	t.Helper()
	o := compare(t, want, got, w.bound, max(tie, 10*w.bound))
	if o.failed == "" {
		return o
	}
	own := k.spread(t, w, ask, want)
	bound := max(w.bound, 2*own.worst)
	within := max(tie, 10*bound, own.parted)
	if own.worst > muchOff {
		within = math.Inf(1)
	}
	t.Logf("%s: %v; the stock engine differs from itself by %.0e, its text by %.2g", w.name, o, own.worst, own.parted)
	return compare(t, want, got, bound, within)
}

// muchOff is a difference of the stock engine from itself, in logits, that makes another text of any. Experts on the software Vulkan
// device have it: all that is shown there is that a mode runs.
const muchOff = 0.05
