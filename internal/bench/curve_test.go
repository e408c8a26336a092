package bench

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
	"time"
)

func samplePoint(depth int, on, off, shielded float64) Point {
	p := Point{Depth: depth, Generate: 32}
	p.sumUp(map[string][]float64{"flash attention on": {on, on * 1.1, on}, "flash attention off": {off, off, off}}, []float64{shielded, shielded, shielded * 1.2})
	return p
}

func TestPointComparesWithTheBestVariant(t *testing.T) {
	p := samplePoint(1024, 20, 25, 30)
	if p.Best != "flash attention off" || p.Ratio.Median != 30.0/25 || p.Ratio.Max != 36.0/25 {
		t.Errorf("best %q, ratio %+v", p.Best, p.Ratio)
	}
}

func TestFitFindsTheLine(t *testing.T) {
	var points []Point
	for _, d := range []int{0, 1000, 4000} {
		points = append(points, samplePoint(d, 1/(0.020+1e-5*float64(d)), 1, 1/(0.022+2e-6*float64(d))))
		p := &points[len(points)-1]
		p.Shielded.Median = 1 / (0.022 + 2e-6*float64(d))
		p.Stock[p.Best] = Spread{Median: 1 / (0.020 + 1e-5*float64(d))}
	}
	f := fit(points)
	for name, c := range map[string][2]float64{"stock start": {f.StockStart, 0.020}, "start": {f.Start, 0.022}, "stock slope": {f.StockPerCell, 1e-5}, "slope": {f.PerCell, 2e-6}} {
		if math.Abs(c[0]-c[1]) > 1e-9 {
			t.Errorf("%s: %v, want %v", name, c[0], c[1])
		}
	}
	if got, want := f.Predict(5*time.Millisecond, 10_000), 1/(0.005+0.002+0.02); math.Abs(got-want) > 1e-6 {
		t.Errorf("predicted %v, want %v", got, want)
	}
	if fit(points[:1]) != nil {
		t.Error("a line through one point")
	}
}

func TestPlotIsSoundSVG(t *testing.T) {
	r := &Report{Mode: "resident", Curve: &Curve{Points: []Point{samplePoint(4096, 17, 20, 29), samplePoint(0, 39, 36, 36), {Prompt: 512}}}}
	var b bytes.Buffer
	if err := r.PlotSVG(&b); err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(bytes.NewReader(b.Bytes())); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("%v in\n%s", err, &b)
		}
	}
	for _, want := range []string{"mode resident", "stock, flash attention off", ">4096<", "prefers-color-scheme: dark"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the plot lacks %q", want)
		}
	}
	if strings.Contains(b.String(), "NaN") || strings.Contains(b.String(), "ZgotmplZ") || strings.Contains(b.String(), "<script") {
		t.Errorf("the plot holds what it should not:\n%s", &b)
	}
	if err := (&Report{Curve: &Curve{Points: []Point{samplePoint(1, 1, 1, 1)}}}).PlotSVG(io.Discard); !errors.Is(err, ErrNoCurve) {
		t.Errorf("a plot of one point: %v", err)
	}
}
