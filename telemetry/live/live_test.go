package live

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/kvshield/kvshield/hooks/meter"
)

// clock ticks a window once a second.
type clock struct {
	w   Window
	now time.Time
	n   int
}

func (c *clock) tick(t meter.Totals, layers ...meter.Layer) {
	c.now = c.now.Add(time.Second)
	c.w.Tick(c.now, t, layers)
	c.n++
}

func near(a, b float64) bool { return math.Abs(a-b) <= 1e-9*math.Max(1, math.Abs(b)) }

func TestTokensOfTheLastSeconds(t *testing.T) {
	var c clock
	c.tick(meter.Totals{})
	for i := range 10 {
		for range i {
			c.w.Token(0.5)
		}
		c.tick(meter.Totals{})
	}
	if total, rate := c.w.Decoded(); total != 45 || rate != 7 {
		t.Errorf("%d tokens, %v in a second", total, rate)
	}
	c.w.Tokens(5)
	c.tick(meter.Totals{})
	if total, rate := c.w.Decoded(); total != 50 || rate != 7 {
		t.Errorf("%d tokens, %v in a second", total, rate)
	}
}

func TestShareOfTheLastMinute(t *testing.T) {
	var c clock
	c.tick(meter.Totals{})
	c.w.Token(0.999)
	for range 98 {
		c.w.Token(0.5)
	}
	c.w.Token(1)
	c.tick(meter.Totals{})
	d := c.w.Share()
	if len(d.Bounds) != shareParts || len(d.Counts) != shareParts+1 || d.Bounds[19] != 0.5 || d.Counts[19] != 98 || d.Counts[39] != 2 || d.Counts[40] != 0 {
		t.Errorf("%+v", d)
	}
	if d.P50 < 0.475 || d.P50 > 0.5 || d.P99 < 0.975 || d.P99 > 1 {
		t.Errorf("p50 %v, p99 %v", d.P50, d.P99)
	}
	for range seconds {
		c.tick(meter.Totals{})
	}
	if d := c.w.Share(); d.P50 != 0 || d.Counts[19] != 0 {
		t.Errorf("a minute later: %+v", d)
	}
}

func TestTransitions(t *testing.T) {
	var c clock
	totals := meter.Totals{Transitions: 1000, Bytes: 1 << 20}
	totals.Histogram[0] = 1000
	c.tick(totals)
	for range 3 {
		totals.Transitions += 10
		totals.Bytes += 300
		totals.Histogram[16] += 10
		c.tick(totals)
	}
	d, rate, bytes := c.w.Transitions()
	if rate != 10 || bytes != 300 || d.Counts[0] != 0 || d.Counts[4] != 30 || d.P50 != meter.BucketEnd(16).Seconds() {
		t.Errorf("%+v, %v, %v", d, rate, bytes)
	}
}

func TestFold(t *testing.T) {
	var h meter.Histogram
	for i := range h {
		h[i] = uint64(i)
	}
	bounds, counts := Fold(&h)
	if len(bounds)+1 != len(counts) || counts[0] != 0+1+2+3 || bounds[0] != meter.BucketEnd(3).Seconds() {
		t.Error(bounds, counts)
	}
	var all uint64
	for i, n := range counts {
		all += n
		if i > 0 && i < len(bounds) && bounds[i] <= bounds[i-1] {
			t.Errorf("bounds %v", bounds)
		}
	}
	if all != meter.Buckets*(meter.Buckets-1)/2 {
		t.Errorf("%d counted", all)
	}
}

func TestLayersOfAnEngineThatWasStartedAgain(t *testing.T) {
	layer := func(n uint64, each time.Duration) meter.Layer {
		return meter.Layer{Transitions: n, Wait: time.Duration(n) * each, Enclave: time.Duration(n) * each / 2}
	}
	var c clock
	c.tick(meter.Totals{}, layer(100, time.Second))
	c.tick(meter.Totals{}, layer(110, time.Second), layer(10, time.Millisecond))
	c.tick(meter.Totals{}) // it is gone
	c.tick(meter.Totals{}, layer(10, time.Second))
	got := c.w.Layers()
	if len(got) != 2 || !near(got[0].Wait, 1) || !near(got[0].Enclave, 0.5) || !near(got[1].Wait, 0.001) {
		t.Errorf("%+v", got)
	}
}

func TestTheLastErrorsAreKept(t *testing.T) {
	var e Errors
	for i := range 50 {
		e.Add(time.Now(), "log", fmt.Sprint(i))
	}
	if l := e.List(); len(l) != maxErrors || l[0].Message != "30" || l[maxErrors-1].Message != "49" {
		t.Errorf("%+v", l)
	}
}
