package bench

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"
)

// Curve is speed over context length: the stock engine in each of its ways to compute attention, and the shielded one.
type Curve struct {
	Points []Point `json:"points"`
	Model  *Fit    `json:"model,omitempty"` // of decode; nil with fewer than two depths
}

// Point is one kind of work at one depth.
type Point struct {
	Depth    int               `json:"depth"`    // tokens in the context before it
	Prompt   int               `json:"prompt"`   // tokens of a prefill; 0: decode
	Generate int               `json:"generate"` // tokens of a decode; 0: prefill
	Stock    map[string]Spread `json:"stock"`    // tokens/s of each variant
	Best     string            `json:"best"`     // the fastest of them
	Shielded Spread            `json:"shielded"`
	Ratio    Spread            `json:"ratio"` // shielded / best, round by round
}

// Fit says how the time of a decoded token grows with the context, by least squares over the points: seconds at depth 0, and for each
// token of context.
type Fit struct {
	StockStart   float64 `json:"stock_start_seconds"`
	Start        float64 `json:"shielded_start_seconds"`
	PerCell      float64 `json:"shielded_seconds_per_token_of_context"`
	StockPerCell float64 `json:"stock_seconds_per_token_of_context"`
}

// variant is one way in which a stock engine computes attention.
type variant struct {
	name string
	args []string
}

func (c *Config) variants() []variant {
	list := []variant{{"flash attention on", []string{"-fa", "1"}}, {"flash attention off", []string{"-fa", "0"}}}
	if c.Device {
		list = append(list, variant{"cache on the host", []string{"-fa", "1", "-nkvo", "1"}})
	}
	return list
}

// measureCurve takes every point in every round, stock variants first.
func (c *Config) measureCurve(ctx context.Context) (*Curve, error) {
	points := c.points()
	if len(points) == 0 {
		return nil, nil
	}
	stock := make([]map[string][]float64, len(points))
	shielded := make([][]float64, len(points))
	for round := range c.Runs {
		for i, p := range points {
			if stock[i] == nil {
				stock[i] = map[string][]float64{}
			}
			for _, v := range c.variants() {
				s, err := c.measurePoint(ctx, round, p, "stock, "+v.name, nil, v.args)
				if err != nil {
					return nil, err
				}
				stock[i][v.name] = append(stock[i][v.name], s)
			}
			s, err := c.measurePoint(ctx, round, p, "shielded", c.NewShield, c.variants()[0].args)
			if err != nil {
				return nil, err
			}
			shielded[i] = append(shielded[i], s)
		}
	}
	for i := range points {
		points[i].sumUp(stock[i], shielded[i])
	}
	return &Curve{points, fit(points)}, nil
}

// points are a decode at each depth, and a prefill of each length into an empty context.
func (c *Config) points() []Point {
	var list []Point
	for _, d := range c.Depths {
		list = append(list, Point{Depth: d, Generate: c.Generate})
	}
	for _, n := range c.Prefills {
		list = append(list, Point{Prompt: n})
	}
	return list
}

func (p Point) String() string {
	if p.Prompt > 0 {
		return fmt.Sprintf("prefill %d", p.Prompt)
	}
	return fmt.Sprintf("decode %d at depth %d", p.Generate, p.Depth)
}

func (c *Config) measurePoint(ctx context.Context, round int, p Point, side string, start func() (Shield, error), args []string) (float64, error) {
	defer c.Progress(fmt.Sprintf("round %d of %d: %v, %s", round+1, c.Runs, p, side))()
	s, err := under(ctx, start, func(ctx context.Context, shield Shield) (speed, error) {
		return c.measureSpeed(ctx, shield, p.Prompt, p.Generate, append([]string{"-d", strconv.Itoa(p.Depth)}, args...)...)
	})
	if err != nil {
		return 0, fmt.Errorf("%v, %s: %w", p, side, err)
	}
	return s.PerSecond, nil
}

func (p *Point) sumUp(stock map[string][]float64, shielded []float64) {
	p.Stock, p.Shielded = map[string]Spread{}, spread(shielded)
	for name, samples := range stock {
		p.Stock[name] = spread(samples)
		if p.Best == "" || p.Stock[name].Median > p.Stock[p.Best].Median {
			p.Best = name
		}
	}
	var ratio []float64
	for i, s := range shielded {
		ratio = append(ratio, s/stock[p.Best][i])
	}
	p.Ratio = spread(ratio)
}

// fit is nil where there are no two depths to tell a slope from.
func fit(points []Point) *Fit {
	var depth, stock, shielded []float64
	for _, p := range points {
		if p.Generate > 0 {
			depth = append(depth, float64(p.Depth))
			stock = append(stock, 1/p.Stock[p.Best].Median)
			shielded = append(shielded, 1/p.Shielded.Median)
		}
	}
	if len(depth) < 2 || slices.Min(depth) == slices.Max(depth) {
		return nil
	}
	f := &Fit{}
	f.StockStart, f.StockPerCell = line2(depth, stock)
	f.Start, f.PerCell = line2(depth, shielded)
	return f
}

// line2 is the line through points by least squares: its value at 0 and its slope.
func line2(x, y []float64) (at0, slope float64) {
	var mx, my, xx, xy float64
	for i := range x {
		mx += x[i] / float64(len(x))
		my += y[i] / float64(len(x))
	}
	for i := range x {
		xx += (x[i] - mx) * (x[i] - mx)
		xy += (x[i] - mx) * (y[i] - my)
	}
	slope = xy / xx
	return my - slope*mx, slope
}

// Predict is what the model gives for an engine that takes `engine` for a token by itself: its time, what the shield adds to an
// empty context, and the enclave's time for each token of context. Tokens/s.
func (f *Fit) Predict(engine time.Duration, depth int) float64 {
	return 1 / (engine.Seconds() + max(f.Start-f.StockStart, 0) + max(f.PerCell, 0)*float64(depth))
}

// predictDepths are the contexts that a model is asked for.
var predictDepths = []int{4096, 16384, 32768}

func (r *Report) writeCurve(w io.Writer) {
	if r.Curve == nil {
		return
	}
	fmt.Fprintln(w, "\nover context length, tokens/s; ratio: shielded / best stock variant, round by round")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "\tbest stock\tshielded\tratio\t[min\tmax]\tbest variant\t")
	for _, p := range r.Curve.Points {
		fmt.Fprintf(t, "%v\t%.2f\t%.2f\t%.3f\t[%.3f\t%.3f]\t%s\t\n", p, p.Stock[p.Best].Median, p.Shielded.Median, p.Ratio.Median, p.Ratio.Min, p.Ratio.Max, p.Best)
	}
	t.Flush()
	r.writePrediction(w)
}

func (r *Report) writePrediction(w io.Writer) {
	f := r.Curve.Model
	if f == nil || len(r.Predictions) == 0 {
		return
	}
	fmt.Fprintf(w, "\na model, not a measurement: tokens/s with an engine that takes this long for a token by itself; the shield adds %.2f ms, and %.2f ms for 1,000 tokens of context\n",
		1000*max(f.Start-f.StockStart, 0), 1e6*max(f.PerCell, 0))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "engine\t")
	for _, d := range predictDepths {
		fmt.Fprintf(t, "depth %d\t", d)
	}
	fmt.Fprintln(t)
	for _, engine := range r.Predictions {
		fmt.Fprintf(t, "%v\t", engine)
		for _, d := range predictDepths {
			fmt.Fprintf(t, "%.1f\t", f.Predict(engine, d))
		}
		fmt.Fprintln(t)
	}
	t.Flush()
}
