package e2e

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/internal/tinymodel"
)

// outcome is what became of one architecture in one way of running it.
type outcome struct {
	exact   bool
	refused string  // why, in kvshield's words
	failed  string  // neither
	worst   float64 // largest relative difference of logits
	parted  float64 // how far stock's best token was ahead where a text parted, at most
	ties    int     // prompts whose text parted where the stock engine's two best tokens are as close as rounding
}

func (o outcome) String() string {
	switch {
	case o.exact && o.ties > 0:
		return fmt.Sprintf("exact, %.0e, %d near ties", o.worst, o.ties)
	case o.exact:
		return fmt.Sprintf("exact, %.0e", o.worst)
	case o.refused != "":
		return "refused: " + o.refused
	}
	return "FAILED: " + o.failed
}

var archPrompts = []string{"At last the sailors", "w300 w301 w302 w303 w300 w301", "The Constitution of the United States"}

const archTokens = 64

// answers are greedy texts and the logits of their first tokens.
type answers struct{ texts, firsts []completion }

// tryAnswers asks a server everything. It does not fail the test: an engine may have reasons.
func (s *server) tryAnswers(ask []question) (a answers, err error) {
	for _, q := range ask {
		text, err := s.tryComplete(q.prompt, q.tokens, map[string]any{"logit_bias": noBytes})
		if err != nil {
			return a, err
		}
		first, err := s.tryComplete(q.prompt, 2, map[string]any{"n_probs": vocabulary, "logit_bias": noBytes})
		if err != nil {
			return a, err
		}
		a.texts, a.firsts = append(a.texts, text), append(a.firsts, first)
	}
	return a, nil
}

// noBytes keeps an answer free of tokens that are single bytes: the server holds half a character back, and then its list of
// probabilities is not the list of its tokens.
var noBytes = func() (list [][2]any) {
	for i := range tinymodel.FirstWord {
		list = append(list, [2]any{i, false})
	}
	return list
}()

// compare says whether shielded answers are the stock engine's. bound is for logits, relative; a text may part where the stock
// engine's word is not further ahead than within.
func compare(t *testing.T, stock, shielded answers, bound, within float64) (o outcome) {
	t.Helper()
	for i := range stock.texts {
		for k := range min(len(stock.firsts[i].Probs), len(shielded.firsts[i].Probs)) {
			if k > 0 && stock.firsts[i].Tokens[k-1] != shielded.firsts[i].Tokens[k-1] {
				break
			}
			// max keeps a NaN, and no bound holds for one
			o.worst = max(o.worst, distance(logits(t, stock.firsts[i], k), logits(t, shielded.firsts[i], k)))
		}
		k, ahead := parting(stock.texts[i], shielded.texts[i])
		if k < 0 {
			continue
		}
		if o.parted = max(o.parted, ahead); !(ahead <= within) {
			o.failed = fmt.Sprintf("prompt %d parts at token %d, where stock's is ahead by %.2g; logits off by %.1e", i, k, ahead, o.worst)
			return o
		}
		o.ties++
	}
	if o.exact = o.worst <= bound; !o.exact {
		o.failed = fmt.Sprintf("logits off by %.1e", o.worst)
	}
	return o
}

// words are what kvshield prints, and what it says of an engine that a hook ended.
var words = regexp.MustCompile(`(?m)(?:^.*kvshield: (?:\S*: )?\s*(.*)$|reason="([^"]*)")`)

// reason is the first thing that kvshield said which is a refusal.
func reason(log string) string {
	for _, m := range words.FindAllStringSubmatch(log, -1) {
		said := m[1] + m[2]
		for _, word := range []string{"not supported", "does not know", "cannot keep", "refused", "mode resident", "mode permute", "another model", "no mode can shield"} {
			if strings.Contains(said, word) && !strings.HasPrefix(said, "serving") {
				return said
			}
		}
	}
	return ""
}

// shielded runs a model under a mode and compares it with what the stock engine said.
func shielded(t *testing.T, model, mode string, w way, stock answers, ask []question, bound, within float64) outcome {
	t.Helper()
	s := launch(t, serveOptions{model: model, mode: mode, env: w.env(t), args: w.args})
	s.client.Timeout = patience
	if err := s.tryReady(); err != nil {
		if why := reason(s.log.String()); why != "" {
			return outcome{refused: why}
		}
		return outcome{failed: err.Error() + " | " + lastLine(s.log.String())}
	}
	got, err := s.tryAnswers(ask)
	if why := reason(s.log.String()); err != nil && why != "" {
		return outcome{refused: why}
	} else if err != nil {
		return outcome{failed: err.Error() + " | " + lastLine(s.log.String())}
	}
	return compare(t, stock, got, bound, within)
}

// refusal is why a mode does not run a model, empty where it does not say.
func refusal(t *testing.T, model, mode string) string {
	t.Helper()
	s := launch(t, serveOptions{model: model, mode: mode})
	if s.tryReady() == nil {
		return ""
	}
	return reason(s.log.String())
}

// way is a way of running each architecture.
type way struct {
	name       string
	args, twin []string
	bound      float64
	vulkan     bool
	shift      bool // past the end of the context
	// only is by default for these; nil is for all.
	only []string
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
	{name: "flash on", args: slices.Concat(common, []string{"-fa", "on"}), twin: slices.Concat(common, []string{"-fa", "off"}), bound: 5e-3},
	{name: "flash off", args: slices.Concat(common, []string{"-fa", "off"}), twin: slices.Concat(common, []string{"-fa", "on"}), bound: 5e-3},
	{name: "shift", args: slices.Concat(shifted, []string{"-fa", "off"}), twin: slices.Concat(shifted, []string{"-fa", "on"}), bound: 1e-3, shift: true, only: strings.Fields("llama qwen3 phi3 gpt2 gpt-oss gemma3 deepseek2 mpt")},
	{name: "Vulkan", args: slices.Concat(device, []string{"-fa", "on"}), twin: slices.Concat(common, []string{"-fa", "on"}), bound: 5e-3, vulkan: true,
		only: strings.Fields("qwen3 phi3 gpt-oss gemma3 deepseek2")},
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
	a, err := s.tryAnswers(ask)
	if err == nil {
		k.known[key] = a
	}
	return a, err
}

// ask returns the stock engine's answers, and how far its twin is from it.
func (k *stockSays) ask(t *testing.T, w way, ask []question) (want answers, own outcome, err error) {
	t.Helper()
	if want, err = k.answers(t, w, w.args, ask); err != nil {
		return want, own, err
	}
	other, err := k.answers(t, w, w.twin, ask)
	if err != nil {
		return want, own, nil // without flash attention, say: then there is nothing to compare with
	}
	if own = compare(t, want, other, math.Inf(1), math.Inf(1)); math.IsNaN(own.worst) {
		return want, own, errors.New("the stock engine's logits are no numbers")
	}
	if math.IsInf(own.parted, 1) { // by how much is not known: that allows nothing
		own.parted = 0
	}
	return want, own, nil
}

// families are run by default; KVSHIELD_ARCHITECTURES=all (make models) runs what the engine knows, all of it.
var families = strings.Fields(`llama llama4 mistral3 qwen2 qwen2moe qwen3 qwen3moe qwen2vl gemma gemma2 gemma3 gemma3n gemma4 phi2 phi3 gpt-oss
	granite olmo2 starcoder2 falcon gptneox stablelm gpt2 mpt bloom command-r cohere2 glm4 smollm3 exaone exaone4 internlm2 minicpm deepseek2 bitnet
	mamba lfm2 granitehybrid
	llama:head64 qwen3:head80 llama:head96 qwen3:head128 llama:head256 qwen2:mqa llama:mqa gptneox:mha qwen3:mha llama:yarn qwen2:yarn gpt-oss:yarn llama:moe`)

// Every architecture that the engine knows: exact, or refused with a reason, in both modes; none runs unshielded.
func TestEveryArchitecture(t *testing.T) {
	e, err := tinymodel.Open(t.TempDir(), filepath.Join(root, ".engine"))
	if err != nil {
		t.Fatal(err)
	}
	names, err := e.Architectures()
	if err != nil {
		t.Fatal(err)
	}
	all := append(names, slices.DeleteFunc(slices.Clone(families), func(name string) bool { return !strings.Contains(name, ":") })...)
	only := os.Getenv("KVSHIELD_ARCHITECTURES")
	switch only {
	case "all":
		names = all
	case "":
		names = families
	default:
		names = strings.Fields(only)
	}
	long := prose(t)[:400]
	table := newModelTable(names)
	t.Cleanup(func() { table.finish(t, all) })
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			model := filepath.Join(dir, "m.gguf")
			r, made := e.Discover(dir, tinymodel.Start(name))
			if made != nil && !errors.Is(made, tinymodel.ErrNotMade) {
				t.Fatal(made)
			}
			if err := r.Write(model); err != nil {
				t.Fatal(err)
			}
			if made != nil {
				onlyRefused(t, table, name, model, made)
				t.Skip(made)
			}
			runWays(t, table, name, model, long, slices.DeleteFunc(slices.Clone(archWays), func(w way) bool {
				return only == "" && w.only != nil && !slices.Contains(w.only, name)
			}))
		})
	}
}

// onlyRefused notes what the stock engine does not run either: the modes may refuse it for a reason of theirs.
func onlyRefused(t *testing.T, table *modelTable, name, model string, why error) {
	t.Helper()
	table.stock(name, why)
	for _, mode := range []string{"resident", "permute"} {
		if refused := refusal(t, model, mode); refused != "" {
			t.Logf("RESULT %s %s: refused: %s", name, mode, refused)
			table.add(name, mode, archWays[0].name, outcome{refused: refused})
		}
	}
}

// runWays runs a model in each way, stock and in both modes.
func runWays(t *testing.T, table *modelTable, name, model, long string, ways []way) {
	t.Helper()
	says := stockSays{model, map[string]answers{}}
	for i, w := range ways {
		ask := w.questions(long)
		want, own, err := says.ask(t, w, ask)
		if err == nil && w.shift && !want.texts[0].Truncated {
			err = errors.New("the stock engine does not shift this context")
		}
		if err != nil {
			t.Logf("RESULT %s %s stock: %v", name, w.name, err)
			if i == 0 {
				onlyRefused(t, table, name, model, err)
				return
			}
			continue
		}
		for _, mode := range []string{"resident", "permute"} {
			bound := max(w.bound, 2*own.worst)
			o := shielded(t, model, mode, w, want, ask, bound, max(tie, 10*bound, own.parted))
			t.Logf("RESULT %s %s %s: %v (stock itself %.0e)", name, w.name, mode, o, own.worst)
			table.add(name, mode, w.name, o)
			if o.failed != "" {
				t.Errorf("%s, %s: %v", mode, w.name, o)
			}
		}
	}
}
