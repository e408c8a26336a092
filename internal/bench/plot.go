package bench

import (
	"errors"
	"fmt"
	"html/template"
	"io"
	"math"
	"slices"
)

// ErrNoCurve is returned for a plot of a run that measured no depths.
var ErrNoCurve = errors.New("there is no curve to plot: name two context lengths or more with --depth")

// Size of the plot, and of the margins around its axes, in pixels.
const (
	plotWidth, plotHeight   = 760, 420
	marginLeft, marginRight = 70, 20
	marginTop, marginBottom = 56, 56
	lowestDepth             = 64.0 // depth 0 is drawn here: the axis is logarithmic
)

// plotted is one line of the plot.
type plotted struct {
	Name, Class string
	Path        string
	Dots        []dot
	LegendX     int
}
type dot struct{ X, Y, Low, High float64 }
type tick struct {
	At   float64
	Text string
}

// PlotSVG draws decode speed over context length. Drawn here and not by a plotting library: one figure, whose colours follow the
// reader's light or dark page, is less than such a library's dependencies.
func (r *Report) PlotSVG(w io.Writer) error {
	if r.Curve == nil {
		return ErrNoCurve
	}
	var points []Point
	for _, p := range r.Curve.Points {
		if p.Generate > 0 {
			points = append(points, p)
		}
	}
	if len(points) < 2 {
		return ErrNoCurve
	}
	slices.SortFunc(points, func(a, b Point) int { return a.Depth - b.Depth })
	top := 0.0
	for _, p := range points {
		top = max(top, p.Shielded.Max)
		for _, s := range p.Stock {
			top = max(top, s.Max)
		}
	}
	a := axes{first: max(float64(points[0].Depth), lowestDepth), last: float64(points[len(points)-1].Depth), top: top * 1.08}
	var lines []plotted
	for i, name := range variantNames(points) {
		lines = append(lines, a.line("stock, "+name, fmt.Sprintf("s%d", i), i, points, func(p Point) Spread { return p.Stock[name] }))
	}
	lines = append(lines, a.line("mode "+r.Mode, "shield", len(lines), points, func(p Point) Spread { return p.Shielded }))
	return plotPage.Execute(w, map[string]any{
		"Width": plotWidth, "Height": plotHeight, "Left": marginLeft, "Right": plotWidth - marginRight, "Top": marginTop, "Bottom": plotHeight - marginBottom,
		"Lines": lines, "X": a.xTicks(points), "Y": a.yTicks(),
		"Title": fmt.Sprintf("%s, %s, %d threads", r.Model.Type, r.Engine.Backends, r.Engine.Threads),
	})
}

func variantNames(points []Point) []string {
	var names []string
	for name := range points[0].Stock {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

type axes struct{ first, last, top float64 }

func (a axes) x(depth int) float64 {
	span := math.Log2(a.last / a.first)
	if span <= 0 {
		return marginLeft
	}
	return marginLeft + math.Log2(max(float64(depth), a.first)/a.first)/span*(plotWidth-marginLeft-marginRight)
}

func (a axes) y(v float64) float64 {
	return plotHeight - marginBottom - v/a.top*(plotHeight-marginTop-marginBottom)
}

func (a axes) line(name, class string, i int, points []Point, of func(Point) Spread) plotted {
	p := plotted{Name: name, Class: class, LegendX: marginLeft + 205*i}
	for j, point := range points {
		s := of(point)
		d := dot{a.x(point.Depth), a.y(s.Median), a.y(s.Min), a.y(s.Max)}
		p.Dots = append(p.Dots, d)
		p.Path += fmt.Sprintf("%s%.1f %.1f", map[bool]string{true: "M", false: " L"}[j == 0], d.X, d.Y)
	}
	return p
}

func (a axes) xTicks(points []Point) []tick {
	var list []tick
	for _, p := range points {
		list = append(list, tick{a.x(p.Depth), fmt.Sprint(p.Depth)})
	}
	return list
}

func (a axes) yTicks() []tick {
	step := math.Pow(10, math.Floor(math.Log10(a.top)))
	for a.top/step < 4 {
		step /= 2
	}
	var list []tick
	for v := 0.0; v <= a.top; v += step {
		list = append(list, tick{a.y(v), fmt.Sprintf("%g", v)})
	}
	return list
}

var plotPage = template.Must(template.New("plot").Parse(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{.Width}} {{.Height}}" font-family="system-ui, sans-serif" font-size="13">
<style>
svg { --ink: #1d2733; --faint: #d5dbe1; --page: #ffffff; --shield: #0a6b3d; --s0: #b3261e; --s1: #8a5a00; --s2: #4a4fb5; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e9ed; --faint: #3a424c; --page: #14181d; --shield: #5fd39a; --s0: #ff8a80; --s1: #f0c060; --s2: #a8adff; } }
.page { fill: var(--page); } text { fill: var(--ink); } .grid { stroke: var(--faint); } .axis { stroke: var(--ink); }
.line { fill: none; stroke-width: 2.5; } .shield { stroke: var(--shield); } .s0 { stroke: var(--s0); stroke-dasharray: 7 4; } .s1 { stroke: var(--s1); stroke-dasharray: 2 4; } .s2 { stroke: var(--s2); stroke-dasharray: 9 3 2 3; }
circle.shield { fill: var(--shield); } circle.s0 { fill: var(--s0); } circle.s1 { fill: var(--s1); } circle.s2 { fill: var(--s2); } .range { stroke-width: 1.5; stroke-dasharray: none; }
</style>
<rect class="page" width="{{.Width}}" height="{{.Height}}"/>
<text x="{{.Left}}" y="20" font-weight="600">decode, tokens/s, over context length: {{.Title}}</text>
{{range .Lines}}<line class="line {{.Class}}" x1="{{.LegendX}}" x2="{{.LegendX}}" y1="40" y2="40"/><path class="line {{.Class}}" d="M{{.LegendX}} 40 h28"/><text x="{{.LegendX}}" dx="34" y="44">{{.Name}}</text>
{{end}}{{range .Y}}<line class="grid" x1="{{$.Left}}" x2="{{$.Right}}" y1="{{printf "%.1f" .At}}" y2="{{printf "%.1f" .At}}"/><text x="{{$.Left}}" dx="-8" y="{{printf "%.1f" .At}}" dy="4" text-anchor="end">{{.Text}}</text>
{{end}}{{range .X}}<line class="axis" x1="{{printf "%.1f" .At}}" x2="{{printf "%.1f" .At}}" y1="{{$.Bottom}}" y2="{{$.Bottom}}"/><text x="{{printf "%.1f" .At}}" y="{{$.Bottom}}" dy="20" text-anchor="middle">{{.Text}}</text>
{{end}}<line class="axis" x1="{{.Left}}" x2="{{.Right}}" y1="{{.Bottom}}" y2="{{.Bottom}}"/>
<text x="{{.Right}}" y="{{.Bottom}}" dy="42" text-anchor="end">tokens in the context (logarithmic)</text>
{{range .Lines}}<path class="line {{.Class}}" d="{{.Path}}"/>
{{$class := .Class}}{{range .Dots}}<circle class="{{$class}}" cx="{{printf "%.1f" .X}}" cy="{{printf "%.1f" .Y}}" r="3.5"/><line class="range {{$class}}" x1="{{printf "%.1f" .X}}" x2="{{printf "%.1f" .X}}" y1="{{printf "%.1f" .Low}}" y2="{{printf "%.1f" .High}}"/>
{{end}}{{end}}</svg>
`))
