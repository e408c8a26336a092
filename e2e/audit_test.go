package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/audit"
)

// auditRun runs kvshield audit and returns its report and exit code. The engines get one thread, like those of the other tests: two that
// wait for each other crawl on a machine that does something else besides.
func auditRun(t *testing.T, env []string, args ...string) (*audit.Report, int) {
	t.Helper()
	if !slices.Contains(args, "--") {
		args = append(args, "--")
	}
	cmd := exec.Command(kvshield, slices.Concat([]string{"audit", "--json", "--engine", engine("llama-server")}, args, []string{"-t", "1"})...)
	var out, log bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), env...), &out, &log
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var r audit.Report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("%v, exit code %d\n%s", err, cmd.ProcessState.ExitCode(), &log)
	}
	return &r, cmd.ProcessState.ExitCode()
}

// bounds are what an attack has to recover: at least, in the stock mode and in mode permute, and at most in mode permute.
type bounds struct{ stock, permute, atMost float64 }

func checkAudit(t *testing.T, r *audit.Report, want map[string]bounds, sources ...audit.Source) {
	t.Helper()
	checkAuditWithin(t, 0.02, r, want, sources...)
}

// checkAuditWithin takes how much more than chance a control may read.
func checkAuditWithin(t *testing.T, slack float64, r *audit.Report, want map[string]bounds, sources ...audit.Source) {
	t.Helper()
	if r.Schema != audit.Schema || len(r.Runs) != 3 || r.Runs[0].Mode != "off" || r.Runs[1].Mode != "permute" || r.Runs[2].Mode != "resident" {
		t.Fatalf("schema %q, %d runs", r.Schema, len(r.Runs))
	}
	for i := range r.Runs {
		run := &r.Runs[i]
		if len(run.Truth) != run.Tokens || run.Tokens < 300 {
			t.Errorf("%s: %d tokens of %d have a text", run.Mode, len(run.Truth), run.Tokens)
		}
		if run.Mode == "resident" {
			checkNothing(t, run)
		}
		for attack, b := range want {
			for _, source := range sources {
				at := slices.IndexFunc(run.Results, func(x audit.Result) bool { return x.Attack == attack && x.Source == source })
				if at < 0 {
					t.Errorf("%s: %s on the %s was not run", run.Mode, attack, source)
					continue
				}
				checkResult(t, slack, run, &run.Results[at], b)
			}
		}
	}
}

func checkResult(t *testing.T, slack float64, run *audit.Run, res *audit.Result, b bounds) {
	t.Helper()
	least, atMost := b.stock, 1.0
	switch run.Mode {
	case "permute":
		least, atMost = b.permute, b.atMost
	case "resident":
		least, atMost = 0, run.Chance+0.01
	}
	if res.Skipped != "" || res.Rate < least || res.Rate > atMost {
		t.Errorf("%s: %s on the %s recovers %.4f, want %v to %v; %s", run.Mode, res.Attack, res.Source, res.Rate, least, atMost, res.Skipped)
	}
	for name, control := range map[string]*float64{"random numbers": res.Random, "another conversation": res.Other} {
		if control == nil {
			t.Errorf("%s: %s was not run on %s", run.Mode, res.Attack, name)
		} else if *control > run.Chance+slack {
			t.Errorf("%s: %s reads %.3f from %s, chance is %.4f", run.Mode, res.Attack, *control, name, run.Chance)
		}
	}
}

// checkNothing: no attack on any source recovers more than chance and one in a hundred.
func checkNothing(t *testing.T, run *audit.Run) {
	t.Helper()
	if len(run.Results) == 0 {
		t.Error("no attack was run")
	}
	for _, res := range run.Results {
		if res.Rate > run.Chance+0.01 {
			t.Errorf("%s: %s on the %s recovers %.4f, chance is %.4f", run.Mode, res.Attack, res.Source, res.Rate, run.Chance)
		}
	}
	says := []string{"bytes of zeros"}
	if slices.ContainsFunc(run.Results, func(r audit.Result) bool { return r.Source == audit.SlotFile }) {
		says = append(says, "the slot file is sealed by the enclave")
	}
	for _, want := range says {
		if !slices.ContainsFunc(run.Clear, func(s string) bool { return strings.Contains(s, want) }) {
			t.Errorf("%s: nobody says %q: %q", run.Mode, want, run.Clear)
		}
	}
}

func everyAttack() (list []string) {
	for _, a := range audit.Attacks() {
		list = append(list, a.Key)
	}
	return list
}

// withoutEngine are the attacks that the length of a conversation is something to. The others try tokens in an engine, always with the
// same number of the first ones, until their time is up.
func withoutEngine() (list []string) {
	for _, a := range audit.Attacks() {
		if !a.Engine {
			list = append(list, a.Key)
		}
	}
	return list
}

// Every attack, on conversations of some 64, 512 and 2,000 tokens: broken in the stock mode, nothing in mode resident.
func TestAuditOfResidentAtEveryLength(t *testing.T) {
	for name, test := range map[string]struct {
		characters, least, most int
		attacks                 func() []string
	}{
		"64": {80, 50, 140, withoutEngine}, "512": {900, 400, 700, everyAttack}, "2000": {20_000, 1900, 2048, withoutEngine},
	} {
		t.Run(name, func(t *testing.T) {
			prompt := filepath.Join(t.TempDir(), "prompt.txt")
			if err := os.WriteFile(prompt, []byte(prose(t)[:test.characters]), 0o600); err != nil {
				t.Fatal(err)
			}
			r, _ := auditRun(t, nil, "-m", demoModel, "--prompt", prompt, "--mode", "off,resident", "--attack", strings.Join(test.attacks(), ","))
			for i := range r.Runs {
				run := &r.Runs[i]
				t.Logf("%s: %d tokens, chance %.4f, %d results, %q", run.Mode, run.Tokens, run.Chance, len(run.Results), run.Clear)
				if run.Tokens < test.least || run.Tokens > test.most {
					t.Errorf("%s: %d tokens, want %d to %d", run.Mode, run.Tokens, test.least, test.most)
				}
				if share, attack := run.Worst(); run.Mode == "off" && share < 0.99 {
					t.Errorf("the stock cache: the best attack (%s) recovers %.3f", attack, share)
				}
			}
			checkNothing(t, &r.Runs[1])
		})
	}
}

var expected = map[string]bounds{
	"naive-values":    {0.99, 0, 0.01},
	"naive-keys":      {0.99, 0, 0.01},
	"sorted-values":   {0.99, 0.95, 1},
	"head-norms":      {0.99, 0.95, 1},
	"pair-magnitudes": {0.99, 0.95, 1},
	"gram-matrix":     {0.99, 0.95, 1},
	"weight-matching": {0.99, 0.95, 1},
	"known-prefix-16": {0.99, 0.95, 1},
	"known-prefix-64": {0.99, 0.95, 1},
	"self-training":   {0.99, 0.95, 1},
}

func keys(m map[string]bounds) string {
	var list []string
	for key := range m {
		list = append(list, key)
	}
	return strings.Join(list, ",")
}

func TestAuditOfTheDemoModel(t *testing.T) {
	page := filepath.Join(t.TempDir(), "report.html")
	r, code := auditRun(t, nil, "-m", demoModel, "--html", page)
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	checkAudit(t, r, expected, audit.SlotFile, audit.LiveCache)
	for i, least := range []float64{0.99, 0} { // resident is checkNothing's
		run := &r.Runs[i]
		for _, res := range run.Results {
			switch {
			// It stops when its time is up, so that a slow machine recovers less; chance is 0.04.
			case res.Attack == "collision" && res.Rate < 0.2:
				t.Errorf("%s: collision recovers %.3f", run.Mode, res.Rate)
			case res.Attack == "repetition" && res.Figures["auc"] < 0.99:
				t.Errorf("%s: repetition %v", run.Mode, res.Figures)
			case res.Attack == "memory-scan" && res.Source == audit.Memory && (res.Rate < least || least == 0 && res.Rate > 0.01):
				t.Errorf("%s: %.3f found in the process's memory", run.Mode, res.Rate)
			}
		}
		if !slices.ContainsFunc(run.Clear, func(s string) bool { return strings.Contains(s, "token ids in clear") }) {
			t.Errorf("%s: nobody says that the slot file carries the tokens: %q", run.Mode, run.Clear)
		}
	}
	b, err := os.ReadFile(page)
	if err != nil || !strings.Contains(string(b), "sorted values of each head") || !strings.Contains(string(b), "Ellison") {
		t.Errorf("the page has %d bytes and lacks the table or the conversation; %v", len(b), err)
	}
	for _, dir := range []string{"/dev/shm", os.TempDir()} {
		if left, _ := filepath.Glob(filepath.Join(dir, "kvshield-audit-*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

func TestAuditOfAQuantisedCache(t *testing.T) {
	r, _ := auditRun(t, nil, "-m", demoModel, "--cache-type", "q8_0", "--attack", keys(expected))
	checkAudit(t, r, expected, audit.SlotFile, audit.LiveCache)
}

// Another head dimension and head count, and a cache with transposed values.
func TestAuditOfAnotherShape(t *testing.T) {
	model := filepath.Join(t.TempDir(), "second.gguf")
	out, err := exec.Command("go", "run", "../internal/benchmodel", "-o", model, "-layers", "3", "-width", "384", "-heads", "8", "-kv-heads", "4",
		"-ffn", "512", "-vocab", "2000", "-context", "2048", "-type", "F16").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r, _ := auditRun(t, nil, "-m", model, "--attack", keys(expected), "--", "-fa", "off")
	checkAudit(t, r, expected, audit.SlotFile, audit.LiveCache)
	if m := r.Model; m.HeadDim != 48 || m.HeadsKV != 4 || m.Vocabulary != 2000 {
		t.Errorf("%+v", m)
	}
}

// One model of each family: what holds and what falls does not depend on where an architecture puts its rows and frequencies.
func TestAuditOfEachFamily(t *testing.T) {
	some := map[string]bounds{}
	for _, key := range []string{"naive-values", "naive-keys", "sorted-values", "head-norms", "gram-matrix", "weight-matching", "known-prefix-64"} {
		some[key] = expected[key]
	}
	some["naive-keys"] = bounds{0.99, 0, 0.05} // some hundred bytes of 1,024 tokens, and two heads
	// Embeddings of positions are added to tokens: the attacks know them at one position only, and find fewer tokens.
	learned := map[string]bounds{"naive-values": {0.2, 0, 0.01}, "naive-keys": {0.2, 0, 0.01}, "weight-matching": {0.2, 0.2, 1}, "known-prefix-64": {0.2, 0.2, 1}}
	both := []audit.Source{audit.SlotFile, audit.LiveCache}
	for name, test := range map[string]struct {
		model   string
		want    map[string]bounds
		sources []audit.Source
	}{
		"plain RoPE": {"llama", some, both}, "neox RoPE": {"qwen3", some, both}, "fused QKV": {"gptneox", some, both},
		"no RoPE": {"gpt2", learned, both}, "experts": {"qwen3moe", some, both},
		"sliding window": {"gemma2", some, both[1:]}, "two rotary bases": {"gemma3", some, both[1:]},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := auditRun(t, nil, "-m", tiny(t, test.model), "--attack", keys(test.want))
			// Two texts in single bytes have more tokens at the same places than chance has.
			checkAuditWithin(t, 0.1, r, test.want, test.sources...)
			for i := range r.Runs {
				share, attack := r.Runs[i].Worst()
				t.Logf("RESULT %s, mode %s: %s recovers %.3f", test.model, r.Runs[i].Mode, attack, share)
			}
		})
	}
}

// The hook reads the cache out of a device's own memory.
func TestAuditOfAVulkanDevice(t *testing.T) {
	r, _ := auditRun(t, vulkan(t), "-m", demoModel, "--attack", "naive-values,sorted-values,weight-matching")
	want := map[string]bounds{}
	for _, key := range []string{"naive-values", "sorted-values", "weight-matching"} {
		want[key] = expected[key]
	}
	checkAudit(t, r, want, audit.SlotFile, audit.LiveCache)
}

func TestAuditFailsAbove(t *testing.T) {
	prompt := filepath.Join(t.TempDir(), "letter.txt")
	if err := os.WriteFile(prompt, []byte(strings.Repeat("The ship lay at anchor in the bay. ", 12)), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-m", demoModel, "--prompt", prompt, "--mode", "permute", "--fail-above", "50"}
	if _, code := auditRun(t, nil, append(args, "--attack", "naive-values")...); code != 0 {
		t.Errorf("naive: exit code %d, want 0", code)
	}
	if _, code := auditRun(t, nil, append(args, "--attack", "sorted-values")...); code != 3 {
		t.Errorf("sorted: exit code %d, want 3", code)
	}
}
