// Package report shows people what an audit found: [WriteTable] in a terminal, [WriteHTML] as one page that needs nothing
// beside itself, not even a script.
//
// Both show the same: which attack recovered how much in which mode, always beside what chance gives; the text that was
// recovered beside the true one; where the leak was; and what lay open beside the cache. They draw no conclusion from a figure that
// chance explains as well.
//
// Everything in a report but its numbers is foreign text: a model's file named itself, a language model wrote the conversation.
// None of it reaches the output before its control characters and invisible ones are made visible.
package report

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/kvshield/kvshield/audit"
)

// errNone is for a nil report.
var errNone = errors.New("no report to show: run the audit first")

// row of the table attack × mode.
type row struct {
	Title    string
	Attacker string
	Known    int // tokens that the attacker was told
	Cells    []cell
}

// cell is what one attack did in one mode.
type cell struct {
	Run     *audit.Run
	Best    *audit.Result   // of all sources the one that gave most; nil when the attack was not run
	Others  []*audit.Result // the same attack on other sources
	Skipped []string        // reasons, when it was not run
}

// ran is the key of a row. One attack with 16 and with 32 known tokens is two rows.
type rowKey struct {
	attack string
	known  int
}

// rowsOf is the table attack × mode, sorted by attacker and else in the order in which the attacks are first met.
// An attack that never ran has a row too.
func rowsOf(r *audit.Report) []row {
	var keys []rowKey
	rows := map[rowKey]*row{}
	known := map[string]bool{}
	add := func(res *audit.Result) {
		k := rowKey{res.Attack, res.Known}
		if rows[k] == nil {
			keys = append(keys, k)
			rows[k] = &row{cmp.Or(res.Title, res.Attack), res.Attacker, res.Known, make([]cell, len(r.Runs))}
			known[res.Attack] = true
		}
	}
	for res := range results(r) {
		if res.Skipped == "" {
			add(res)
		}
	}
	for res := range results(r) {
		if !known[res.Attack] {
			add(res)
		}
	}
	sorted := make([]row, 0, len(keys))
	for _, k := range keys {
		for i := range r.Runs {
			rows[k].Cells[i] = cellOf(&r.Runs[i], k)
		}
		sorted = append(sorted, *rows[k])
	}
	slices.SortStableFunc(sorted, func(a, b row) int { return cmp.Compare(a.Attacker, b.Attacker) })
	return sorted
}

// results of all runs, one after another.
func results(r *audit.Report) func(yield func(*audit.Result) bool) {
	return func(yield func(*audit.Result) bool) {
		for i := range r.Runs {
			for j := range r.Runs[i].Results {
				if !yield(&r.Runs[i].Results[j]) {
					return
				}
			}
		}
	}
}

func cellOf(run *audit.Run, k rowKey) cell {
	c := cell{Run: run}
	for i := range run.Results {
		res := &run.Results[i]
		switch {
		case res.Attack != k.attack:
		case res.Skipped != "":
			if !slices.Contains(c.Skipped, res.Skipped) {
				c.Skipped = append(c.Skipped, res.Skipped)
			}
		case res.Known == k.known:
			c.add(res)
		}
	}
	if c.Best != nil {
		c.Skipped = nil
	}
	return c
}

func (c *cell) add(res *audit.Result) {
	switch {
	case c.Best == nil:
		c.Best = res
	case res.Rate > c.Best.Rate:
		c.Others = append(c.Others, c.Best)
		c.Best = res
	default:
		c.Others = append(c.Others, res)
	}
}

// worst is the result that recovered most; nil when no attack ran.
func worst(run *audit.Run) *audit.Result {
	var most *audit.Result
	for i := range run.Results {
		res := &run.Results[i]
		if res.Skipped == "" && !figuresOnly(res) && (most == nil || res.Rate > most.Rate) {
			most = res
		}
	}
	return most
}

// figuresOnly says that an attack does not name tokens at all, so that its rate means nothing.
func figuresOnly(res *audit.Result) bool { return len(res.Figures) > 0 && len(res.Guess) == 0 }

// Chance, for figures that are not a share of tokens.
const (
	aucChance = 0.5
	aucLeak   = 0.6
)

// leaks says that an attack recovered more than chance explains: three standard errors more than the best of what is recovered by
// guessing the most frequent token, from random numbers, and from another conversation's cache.
func leaks(run *audit.Run, res *audit.Result) bool {
	if figuresOnly(res) {
		return res.Figures["auc"] >= aucLeak
	}
	n := float64(max(res.Tokens, 1))
	base := math.Max(baseline(run, res), 1/n)
	return res.Rate > base+3*math.Sqrt(base*(1-base)/n)
}

// baseline is the largest share of tokens that somebody gets without this conversation's cache, 0 to 1.
func baseline(run *audit.Run, res *audit.Result) float64 {
	base := run.Chance
	for _, control := range []*float64{res.Random, res.Other} {
		if control != nil {
			base = max(base, *control)
		}
	}
	return share(base)
}

// share brings a number into 0 to 1, so that a broken report draws no nonsense.
func share(f float64) float64 {
	if math.IsNaN(f) {
		return 0
	}
	return min(max(f, 0), 1)
}

// percent of a share: "4.3 %". Only what is all is called 100 %, and only what is nothing 0 %.
func percent(f float64) string {
	if math.IsNaN(f) || f < 0 || f > 1 {
		return "? %"
	}
	return number(f) + " %"
}

// number is [percent] without the sign.
func number(f float64) string {
	switch p := f * 100; {
	case math.IsNaN(f) || f < 0 || f > 1:
		return "?"
	case f == 0 || f == 1:
		return fmt.Sprintf("%.0f", p)
	case p < 0.1:
		return "<0.1"
	default:
		return fmt.Sprintf("%.1f", min(p, 99.9))
	}
}

// count with its thousands apart: 128,256.
func count(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// controls are what chance gives beside a result: the most frequent token, random numbers, another conversation; in percent.
func controls(run *audit.Run, res *audit.Result) []string {
	c := []string{number(run.Chance), "–", "–"}
	for i, control := range []*float64{res.Random, res.Other} {
		if control != nil {
			c[i+1] = number(*control)
		}
	}
	return c
}

// figure of a result: the share of tokens, and what is no share by its name ("auc 0.98").
func figure(res *audit.Result) string {
	var parts []string
	if !figuresOnly(res) {
		parts = append(parts, percent(res.Rate))
	}
	for _, name := range sortedKeys(res.Figures) {
		parts = append(parts, fmt.Sprintf("%s %.2f", name, res.Figures[name]))
	}
	return strings.Join(parts, ", ")
}

func sortedKeys(m map[string]float64) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// pair is a token and what an attack took it for.
type pair struct {
	Truth, Found string
	Right        bool
}

// pairs aligns what was recovered with the truth. Lengths that differ are no error: what lacks a partner is left out.
func pairs(run *audit.Run, res *audit.Result) []pair {
	truth := run.Truth[min(max(res.Known, 0), len(run.Truth)):]
	n := min(len(truth), len(res.Guess))
	p := make([]pair, n)
	for i := range n {
		p[i] = pair{truth[i], res.Guess[i].Text, res.Guess[i].Right}
	}
	return p
}

// model in one line.
func model(m audit.Model) string {
	return fmt.Sprintf("%s (%s, %s layers, %s KV heads of %s, vocabulary %s)", cmp.Or(m.Name, "unnamed"), cmp.Or(m.Architecture, "unknown architecture"),
		count(m.Layers), count(m.HeadsKV), count(m.HeadDim), count(m.Vocabulary))
}

// version of this program as its build names it.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return cmp.Or(info.Main.Version, "(devel)")
	}
	return "unknown"
}
