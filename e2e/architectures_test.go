package e2e

import (
	"fmt"
	"os"
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
	unknown string  // why the stock engine does not run it, so that there is nothing to compare with
	failed  string  // none of these
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
	case o.unknown != "":
		return "unknown: " + o.unknown
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

// shielded runs a model under a mode. The outcome is why there are no answers.
func shielded(t *testing.T, model, mode string, w way, ask []question) (got answers, o outcome) {
	t.Helper()
	s := launch(t, serveOptions{model: model, mode: mode, env: w.env(t), args: w.args})
	defer s.stop()
	s.client.Timeout = patience
	err := s.tryReady()
	if err == nil {
		got, err = s.tryAnswers(ask)
	}
	if err != nil {
		return answers{}, s.notRun(err)
	}
	return got, o
}

// notRun is the outcome where a shielded engine gave no answer: a refusal is one that says why.
func (s *server) notRun(err error) outcome {
	if why := reason(s.log.String()); why != "" {
		return outcome{refused: why}
	}
	return outcome{failed: err.Error() + " | " + lastLine(s.log.String())}
}

// refusal is why a mode does not run a model that the stock engine does not run either, empty where it does not say.
func refusal(t *testing.T, model, mode string) string {
	t.Helper()
	s := launch(t, serveOptions{model: model, mode: mode})
	defer s.stop()
	if s.tryReady() == nil {
		t.Errorf("mode %s serves what the stock engine does not run", mode)
	}
	return reason(s.log.String())
}

// families are run by default, with all shapes; make models runs what the engine knows, all of it.
var families = strings.Fields(`llama llama4 mistral3 qwen2 qwen2moe qwen3 qwen3moe qwen2vl gemma gemma2 gemma3 gemma3n gemma4 phi2 phi3 gpt-oss
	granite olmo2 starcoder2 falcon gptneox stablelm gpt2 mpt bloom command-r cohere2 glm4 smollm3 exaone exaone4 internlm2 minicpm deepseek2 bitnet
	mamba lfm2 granitehybrid bert dream`)

// shapes are other shapes of some architectures.
var shapes = strings.Fields(`llama:head64 qwen3:head80 llama:head96 qwen3:head128 llama:head256 qwen2:mqa llama:mqa gptneox:mha qwen3:mha llama:yarn qwen2:yarn gpt-oss:yarn llama:moe`)

// chosen are the models to run: a few, unless KVSHIELD_ARCHITECTURES says all of them, or which.
func chosen(all, some []string) (names []string, few bool) {
	switch only := os.Getenv("KVSHIELD_ARCHITECTURES"); only {
	case "":
		return some, true
	case "all":
		return all, false
	default:
		return strings.Fields(only), false
	}
}

// Every architecture that the engine knows: exact, or refused with a reason, in both modes; none runs unshielded.
func TestEveryArchitecture(t *testing.T) {
	e, err := tinyEngine()
	if err != nil {
		t.Fatal(err)
	}
	names, err := e.Architectures()
	if err != nil {
		t.Fatal(err)
	}
	all := append(names, shapes...)
	names, few := chosen(all, slices.Concat(families, shapes))
	long := prose(t)[:400]
	table := newModelTable(names)
	t.Cleanup(func() { table.finish(t, all) })
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			model, made := tryTiny(t, name)
			if made == nil {
				made = runWays(t, table, name, model, long, slices.DeleteFunc(slices.Clone(archWays), func(w way) bool {
					return few && w.quick != nil && !slices.Contains(w.quick, name)
				}))
			}
			if made != nil && runEmbedding(t, table, name, model) != nil {
				onlyRefused(t, table, name, model, made)
			}
		})
	}
}

// onlyRefused notes what the stock engine does not run at all: the modes may refuse it for a reason of theirs, when they open the file.
func onlyRefused(t *testing.T, table *modelTable, name, model string, why error) {
	t.Helper()
	table.stock(name, why)
	for _, mode := range []string{"resident", "permute"} {
		o := outcome{refused: refusal(t, model, mode)}
		if o.refused == "" {
			o.unknown = why.Error()
		}
		t.Logf("RESULT %s %s: %v", name, mode, o)
		table.add(name, mode, archWays[0].name, o)
	}
}

// runEmbedding runs a model that makes no text. What keeps no cache has nothing to be shielded: its embeddings must be the same.
func runEmbedding(t *testing.T, table *modelTable, name, model string) error {
	t.Helper()
	s, err := tryStock(t, model, nil, embedding...)
	if err != nil {
		return err
	}
	defer s.stop()
	want, err := s.tryEmbed()
	if err != nil {
		return err
	}
	for _, mode := range []string{"resident", "permute"} {
		o := embedsAlike(t, model, mode, want)
		t.Logf("RESULT %s embedding %s: %v", name, mode, o)
		table.add(name, mode, embeddingWay, o)
		if o.failed != "" {
			t.Errorf("%s, embedding: %v", mode, o)
		}
	}
	return nil
}

// runWays runs a model in each way, stock and in both modes. An error is why the stock engine makes no text with it.
func runWays(t *testing.T, table *modelTable, name, model, long string, ways []way) error {
	t.Helper()
	says := stockSays{model, map[string]answers{}}
	for i, w := range ways {
		ask := w.questions(long)
		want, err := says.ask(t, w, ask)
		if err != nil && i == 0 {
			return err
		} else if err != nil {
			t.Logf("RESULT %s %s stock: %v", name, w.name, err)
			continue
		}
		refused := map[string]int{}
		for _, mode := range []string{"resident", "permute"} {
			got, o := shielded(t, model, mode, w, ask)
			if got.texts != nil {
				o = says.judge(t, w, ask, want, got)
			}
			t.Logf("RESULT %s %s %s: %v", name, w.name, mode, o)
			table.add(name, mode, w.name, o)
			if o.failed != "" {
				t.Errorf("%s, %s: %v", mode, w.name, o)
			}
			if refused[o.refused]++; o.refused != "" && refused[o.refused] == 2 {
				return nil // the file is refused in any mode, and so it is in any way
			}
		}
	}
	return nil
}
