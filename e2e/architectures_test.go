package e2e

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/internal/tinymodel"
)

// outcome is what became of one architecture in one way of running it.
type outcome struct {
	exact   bool
	refused string  // why, in kvshield's words
	failed  string  // neither
	worst   float64 // largest relative difference of logits
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

var archPrompts = []string{"At last the sailors", "w300 w301 w302 w303 w300 w301", "The Constitution of the United States", ""}

const archTokens = 64

// answers are four prompts' greedy texts and the logits of their first tokens.
type answers struct{ texts, firsts []completion }

// tryAnswers asks a server everything. It does not fail the test: an engine may have reasons.
func (s *server) tryAnswers(long string) (a answers, err error) {
	for _, prompt := range archPrompts {
		if prompt == "" {
			prompt = long
		}
		text, err := s.tryComplete(prompt, archTokens, map[string]any{"n_probs": 12, "logit_bias": noBytes})
		if err != nil {
			return a, err
		}
		first, err := s.tryComplete(prompt, 2, map[string]any{"n_probs": vocabulary})
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

// margin is how far the stock engine's best word is ahead of the next, in log-probability.
func margin(c completion, i int) float64 {
	best := math.Inf(1)
	if i >= len(c.Probs) {
		return best
	}
	for _, p := range c.Probs[i].Top {
		switch {
		case p.ID < tinymodel.FirstWord:
		case math.IsInf(best, 1):
			best = p.LogProb
		default:
			return best - p.LogProb
		}
	}
	return math.Inf(1)
}

// compare says whether shielded answers are the stock engine's. bound is for logits, relative.
func compare(t *testing.T, stock, shielded answers, bound float64) (o outcome) {
	t.Helper()
	for i := range stock.texts {
		for k := range min(len(stock.firsts[i].Probs), len(shielded.firsts[i].Probs)) {
			if k > 0 && stock.firsts[i].Tokens[k-1] != shielded.firsts[i].Tokens[k-1] {
				break
			}
			// max keeps a NaN, and no bound holds for one
			o.worst = max(o.worst, distance(logits(t, stock.firsts[i], k), logits(t, shielded.firsts[i], k)))
		}
		for k, token := range stock.texts[i].Tokens {
			if k >= len(shielded.texts[i].Tokens) {
				o.failed = fmt.Sprintf("prompt %d ends after %d tokens", i, k)
				return o
			}
			if shielded.texts[i].Tokens[k] == token {
				continue
			}
			if m := margin(stock.texts[i], k); m > max(0.05, 10*bound) {
				o.failed = fmt.Sprintf("prompt %d parts at token %d, margin %.2g, logits off by %.1e", i, k, m, o.worst)
				return o
			}
			o.ties++
			break
		}
	}
	if o.exact = o.worst <= bound; !o.exact {
		o.failed = fmt.Sprintf("logits off by %.1e", o.worst)
	}
	return o
}

// plainServer starts the stock engine; what it cannot do by itself is an error.
func plainServer(t *testing.T, model string, env []string, args ...string) (*server, error) {
	t.Helper()
	log := &buffer{}
	s, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: engine("llama-server"), Model: model, Socket: filepath.Join(shortDir(t), "s.sock"),
		Args: append([]string{"-t", "1"}, args...), Env: append(append(os.Environ(), "GGML_NO_BACKTRACE=1"), env...), Output: log})
	if err != nil {
		return nil, err
	}
	t.Cleanup(s.Stop)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.WaitHealthy(ctx); err != nil {
		return nil, fmt.Errorf("%w: %s", err, lastLine(log.String()))
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Dial(ctx) }, DisableKeepAlives: true}
	return &server{url: "http://stock", client: &http.Client{Transport: transport, Timeout: patience}, log: log}, nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

var words = regexp.MustCompile(`(?m)^.*kvshield: (?:\S*: )?\s*(.*)$`)

// reason is the first thing that kvshield said which is a refusal.
func reason(log string) string {
	for _, m := range words.FindAllStringSubmatch(log, -1) {
		for _, word := range []string{"not supported", "does not know", "cannot keep", "refused", "mode resident", "mode permute", "another model", "no mode can shield"} {
			if strings.Contains(m[1], word) {
				return m[1]
			}
		}
	}
	return ""
}

// shielded runs a model under a mode and compares it with what the stock engine said.
func shielded(t *testing.T, model, mode string, stock answers, long string, bound float64, env []string, args ...string) outcome {
	t.Helper()
	s := launch(t, serveOptions{model: model, mode: mode, env: env, args: args})
	s.client.Timeout = patience
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		resp, err := s.client.Get(s.url + "/health")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				break
			}
		}
		select {
		case err := <-s.ended:
			s.ended <- err
			if why := reason(s.log.String()); why != "" {
				return outcome{refused: why}
			}
			return outcome{failed: "ended: " + lastLine(s.log.String())}
		default:
		}
		if time.Now().After(end) {
			return outcome{failed: "not ready: " + lastLine(s.log.String())}
		}
	}
	got, err := s.tryAnswers(long)
	if err != nil {
		return outcome{failed: err.Error() + " | " + lastLine(s.log.String())}
	}
	return compare(t, stock, got, bound)
}

// archWays are the ways of running each architecture. With an F32 cache nothing is rounded on its way into the cache, so logits must
// be the same but for the order of sums. The bounds of the others leave room for F16. twin is another way of running the stock
// engine: where it differs from itself by more (experts chosen at a near tie, deep models), twice that is the bound.
var archWays = []struct {
	name       string
	args, twin []string
	bound      float64
}{
	{"F32 cache", []string{"-fa", "off", "-ctk", "f32", "-ctv", "f32"}, []string{"-fa", "on", "-ctk", "f32", "-ctv", "f32"}, 1e-3},
	{"flash on", []string{"-fa", "on"}, []string{"-fa", "off"}, 5e-3},
	{"flash off", []string{"-fa", "off"}, []string{"-fa", "on"}, 5e-3},
}

// stockAnswers asks the stock engine, and says how far its twin is from it.
func stockAnswers(t *testing.T, model, long string, args, twin []string) (want answers, own float64, err error) {
	t.Helper()
	s, err := plainServer(t, model, nil, args...)
	if err != nil {
		return want, 0, err
	}
	if want, err = s.tryAnswers(long); err != nil {
		return want, 0, err
	}
	if s, err = plainServer(t, model, nil, twin...); err != nil {
		return want, 0, nil // without flash attention, say: then there is nothing to compare with
	}
	other, err := s.tryAnswers(long)
	if err != nil {
		return want, 0, nil
	}
	if own = compare(t, want, other, math.Inf(1)).worst; math.IsNaN(own) {
		return want, 0, errors.New("the stock engine's logits are no numbers")
	}
	return want, own, nil
}

// families are run by default; KVSHIELD_ARCHITECTURES=all (make models) runs what the engine knows, all of it.
var families = strings.Fields(`llama llama4 mistral3 qwen2 qwen2moe qwen3 qwen3moe qwen2vl gemma gemma2 gemma3 gemma3n gemma4 phi2 phi3 gpt-oss
	granite olmo2 starcoder2 falcon gptneox stablelm gpt2 mpt command-r cohere2 glm4 smollm3 exaone exaone4 internlm2 minicpm deepseek2 bitnet
	mamba lfm2 granitehybrid`)

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
	switch only := os.Getenv("KVSHIELD_ARCHITECTURES"); only {
	case "all":
	case "":
		names = slices.DeleteFunc(names, func(name string) bool { return !slices.Contains(families, name) })
	default:
		names = strings.Fields(only)
	}
	long := prose(t)[:400]
	table := newModelTable(names)
	t.Cleanup(func() { table.finish(t) })
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			r, err := e.Discover(dir, tinymodel.Start(name))
			if errors.Is(err, tinymodel.ErrNotMade) {
				table.stock(name, err)
				t.Skip(err)
			}
			model := filepath.Join(dir, "m.gguf")
			if err == nil {
				err = r.Write(model)
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, w := range archWays {
				common := []string{"-c", "1024", "-np", "1", "--no-warmup"}
				args := append(common, w.args...)
				want, own, err := stockAnswers(t, model, long, args, slices.Concat(common, w.twin))
				if err != nil {
					t.Logf("RESULT %s %s stock: %v", name, w.name, err)
					table.stock(name, err)
					continue
				}
				for _, mode := range []string{"resident", "permute"} {
					o := shielded(t, model, mode, want, long, max(w.bound, 2*own), nil, args...)
					t.Logf("RESULT %s %s %s: %v (stock itself %.0e)", name, w.name, mode, o, own)
					table.add(name, mode, w.name, o)
					if o.failed != "" {
						t.Errorf("%s, %s: %v", mode, w.name, o)
					}
				}
			}
		})
	}
}
