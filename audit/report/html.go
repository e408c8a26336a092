package report

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"math"
	"strings"

	"github.com/kvshield/kvshield/audit"
)

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{
	"percent": percent, "count": count, "model": model, "figure": figure, "leaks": leaks, "join": strings.Join,
	"controls": controls, "headline": headline, "add": func(a, b int) int { return a + b },
}).Parse(pageText))

// page is what the template shows.
type page struct {
	*audit.Report
	Rows    []row
	Modes   []modeSection
	Version string
}

// modeSection is what there is to say about one mode.
type modeSection struct {
	*audit.Run
	About   about
	Plot    *plot // nil without curves
	Attacks []attackText
}

// attackText is what one attack recovered, beside the truth.
type attackText struct {
	*audit.Result
	Run   *audit.Run
	Pairs []pair
	Open  bool // shown from the start
}

// about says what a mode is good for: docs/threat-model.md.
type about struct{ Holds, Stops, NotStops string }

var modes = map[string]about{
	"off": {"keys and values in clear", "nothing", "anybody who reads the cache has the conversation"},
	"permute": {"keys and values, permuted by a secret of the enclave (KV-Shield, arXiv 2409.04040)",
		"somebody who finds the cache and does not expect a permutation (A1)",
		"somebody who sorts, compares norms or products (A2), compares weights (A3), or knows the first tokens (A4)"},
	"resident": {"zeros: keys and values stay in the enclave", "A1 to A4: there is nothing to attack",
		"somebody who watches all accelerator memory all the time, activations included (A5)"},
}

// shownTokens bounds the text of one attack on the page.
const shownTokens = 4096

// WriteHTML writes a page that needs nothing beside itself: no script, no style sheet, no picture.
func WriteHTML(w io.Writer, r *audit.Report) error {
	if r == nil {
		return errNone
	}
	r = shown(r)
	p := page{Report: r, Rows: rowsOf(r), Version: version()}
	for i := range r.Runs {
		p.Modes = append(p.Modes, sectionOf(&r.Runs[i]))
	}
	return pageTemplate.Execute(w, p)
}

func sectionOf(run *audit.Run) modeSection {
	s := modeSection{Run: run, About: modes[run.Mode], Plot: plotOf(run.Curves)}
	most := worst(run)
	for i := range run.Results {
		res := &run.Results[i]
		if res.Skipped != "" || figuresOnly(res) {
			continue
		}
		all := pairs(run, res)
		s.Attacks = append(s.Attacks, attackText{res, run, all[:min(len(all), shownTokens)], res == most})
	}
	return s
}

// plot of recovery against the length of the snapshot, in the units of its SVG.
type plot struct {
	Lines  []line
	XTicks []tick
	YTicks []tick
}

type line struct {
	Title  string
	Last   string // recovered in the end
	Class  int    // of the colour
	Points string // for a polyline
	Dots   []dot
}

type dot struct {
	X, Y  float64
	Label string
}

type tick struct {
	At    float64
	Label string
}

// The SVG is 640 × 260; the plot itself lies within these edges.
const (
	left, right, top, bottom = 46.0, 628.0, 12.0, 222.0
	colours                  = 8
)

func plotOf(curves []audit.Line) *plot {
	low, high := math.Inf(1), 0.0
	for _, c := range curves {
		for _, p := range c.Points {
			low, high = min(low, float64(max(p.Tokens, 1))), max(high, float64(p.Tokens))
		}
	}
	if high == 0 {
		return nil
	}
	x := func(tokens int) float64 {
		if high <= low {
			return right
		}
		return left + (right-left)*math.Log(float64(max(tokens, 1))/low)/math.Log(high/low)
	}
	y := func(rate float64) float64 { return bottom - (bottom-top)*share(rate) }
	out := &plot{}
	for i, c := range curves {
		l := line{Title: c.Title, Class: i % colours}
		var points []string
		for _, p := range c.Points {
			points = append(points, fmt.Sprintf("%.1f,%.1f", x(p.Tokens), y(p.Rate)))
			l.Dots = append(l.Dots, dot{x(p.Tokens), y(p.Rate), fmt.Sprintf("%s: %s of %s tokens", c.Title, percent(p.Rate), count(p.Tokens))})
			l.Last = percent(p.Rate)
		}
		l.Points = strings.Join(points, " ")
		out.Lines = append(out.Lines, l)
	}
	for n := 1; float64(n) <= high; n *= 2 {
		if float64(n) >= low {
			out.XTicks = append(out.XTicks, tick{x(n), count(n)})
		}
	}
	for _, rate := range []float64{0, 0.25, 0.5, 0.75, 1} {
		out.YTicks = append(out.YTicks, tick{y(rate), fmt.Sprintf("%.0f %%", 100*rate)})
	}
	return out
}
