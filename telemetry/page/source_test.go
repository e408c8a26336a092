package page_test

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/telemetry/page"
)

// machine stands in for a run: its numbers are those of a busy server with a model of 32 layers, and change each time.
type machine struct {
	asked atomic.Int64
	spoil func(*page.Snapshot) // changes what is said next; may be nil
}

func (m *machine) snapshot() page.Snapshot {
	n := m.asked.Add(1)
	wave := math.Sin(float64(n) / 9)
	s := page.Snapshot{
		Time: time.Now(), Mode: "resident", TEE: "software", Model: "demo.gguf", Ready: true,
		Statement:      "an ordinary process, hardened: no core dumps, not traceable, memory locked; root can read it",
		Requests:       page.Requests{Active: int(3 + 2*wave), Queued: int(max(0, 2*wave)), Total: uint64(1200 + n), Failed: 3},
		Tokens:         page.Tokens{Rate: 96 + 14*wave + 5*math.Sin(float64(n)), Total: uint64(91_000 + 96*n)},
		Share:          bell(bounds(40, func(i int) float64 { return float64(i+1) / 40 }), 0.34+0.03*wave, 0.06, 5000),
		Transition:     logBell(bounds(meter.Buckets, func(i int) float64 { return meter.BucketEnd(i).Seconds() }), 62e-6*(1+0.1*wave), 0.3, 185_000),
		TransitionRate: 3168 * (1 + 0.1*wave), BytesRate: 3168 * 12288 * (1 + 0.1*wave),
		Errors: []page.Error{
			{Time: time.Now().Add(-26 * time.Hour), Kind: "unavailable_error", Message: "the enclave died and is started again"},
			{Time: time.Now().Add(-40 * time.Second), Kind: "rate_limit_error", Message: "too many requests are waiting already; send the request again in a moment"},
		},
	}
	for i := range 32 {
		wait := 58e-6 + 4e-6*math.Sin(float64(i)*1.7+float64(n)/5)
		if i == 21 {
			wait *= 1.6
		}
		s.Layers = append(s.Layers, page.Layer{Wait: wait, Enclave: wait * 0.64})
	}
	if m.spoil != nil {
		m.spoil(&s)
	}
	return s
}

func bounds(n int, bound func(int) float64) []float64 {
	all := make([]float64, n)
	for i := range all {
		all[i] = bound(i)
	}
	return all
}

func bell(bounds []float64, mean, width, total float64) page.Distribution {
	return distribution(bounds, total, func(v float64) float64 { return math.Erfc(-(v-mean)/width/math.Sqrt2) / 2 })
}

func logBell(bounds []float64, mean, width, total float64) page.Distribution {
	return distribution(bounds, total, func(v float64) float64 {
		return 0.985*math.Erfc(-math.Log(v/mean)/width/math.Sqrt2)/2 + 0.015*math.Erfc(-math.Log(v/mean/6)/0.4/math.Sqrt2)/2
	})
}

// distribution of values of which below says how many are below.
func distribution(bounds []float64, total float64, below func(float64) float64) page.Distribution {
	d := page.Distribution{Bounds: bounds, Counts: make([]uint64, len(bounds)+1)}
	last := 0.0
	for i, b := range bounds {
		share := below(b)
		d.Counts[i] = uint64(math.Round(total * (share - last)))
		if last < 0.5 && share >= 0.5 {
			d.P50 = b
		}
		if last < 0.99 && share >= 0.99 {
			d.P99 = b
		}
		last = share
	}
	return d
}
