// Package live keeps the last minute of what the enclave cost, for a page that shows how things stand now.
//
// Start with a [Window]: tell it of each token ([Window.Token]), and each second of the totals ([Window.Tick]); the rest of its methods say
// what the minute was like. [Errors] keeps the last errors.
package live

import (
	"slices"
	"sync"
	"time"

	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/telemetry/page"
)

const (
	seconds    = 60
	rateOver   = 5  // seconds
	shareParts = 40 // of a whole
)

// Window of the last minute. Its zero value has seen nothing; it may be used by several goroutines.
type Window struct {
	mu      sync.Mutex
	ring    [seconds]second
	at      int // the second that is filled
	full    int // seconds that are over
	tokens  uint64
	began   time.Time // of the second that is filled
	last    meter.Totals
	layers  []meter.Layer
	started bool
}

type second struct {
	took   time.Duration
	tokens uint64
	share  [shareParts + 1]uint64
	totals meter.Totals
	layers []meter.Layer
}

// Token was decoded; share is the enclave's part of its time, 0 to 1.
func (w *Window) Token(share float64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tokens++
	s := &w.ring[w.at]
	s.tokens++
	s.share[bucketOf(share)]++
}

// bucketOf is the first one whose bound, (i+1) / shareParts, is not below the share.
func bucketOf(share float64) int {
	i := int(share * shareParts)
	if float64(i) == share*shareParts && i > 0 {
		i--
	}
	return max(0, min(i, shareParts))
}

// Tokens were decoded of which nothing more is known.
func (w *Window) Tokens(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tokens += uint64(n)
	w.ring[w.at].tokens += uint64(n)
}

// Tick ends a second.
func (w *Window) Tick(now time.Time, totals meter.Totals, layers []meter.Layer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.started {
		s := &w.ring[w.at]
		s.took, s.totals, s.layers = now.Sub(w.began), difference(totals, w.last), layerDifference(layers, w.layers)
		w.at = (w.at + 1) % seconds
		w.full = min(w.full+1, seconds-1)
		w.ring[w.at] = second{}
	}
	w.started, w.began, w.last, w.layers = true, now, totals, layers
}

func difference(now, before meter.Totals) meter.Totals {
	d := now
	d.Transitions -= before.Transitions
	d.Bytes -= before.Bytes
	d.Wait -= before.Wait
	d.Enclave -= before.Enclave
	for i := range d.Histogram {
		d.Histogram[i] -= before.Histogram[i]
	}
	return d
}

// layerDifference takes a layer that counted less than before for one of an engine that was started again.
func layerDifference(now, before []meter.Layer) []meter.Layer {
	list := slices.Clone(now)
	for i := range list {
		if i < len(before) && before[i].Transitions <= now[i].Transitions {
			list[i].Transitions -= before[i].Transitions
			list[i].Bytes -= before[i].Bytes
			list[i].Wait -= before[i].Wait
			list[i].Enclave -= before[i].Enclave
		}
	}
	return list
}

// past calls f for the last n seconds that are over. The caller holds mu.
func (w *Window) past(n int, f func(*second)) {
	for i := 1; i <= min(n, w.full); i++ {
		f(&w.ring[(w.at-i+seconds)%seconds])
	}
}

// Decoded says how many tokens there were, and how many in a second lately.
func (w *Window) Decoded() (total uint64, rate float64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var n uint64
	var took time.Duration
	w.past(rateOver, func(s *second) { n += s.tokens; took += s.took })
	return w.tokens, per(float64(n), took)
}

func per(n float64, d time.Duration) float64 {
	if d <= 0 {
		return 0
	}
	return n / d.Seconds()
}

// Share is the distribution of what [Window.Token] was told.
func (w *Window) Share() page.Distribution {
	w.mu.Lock()
	defer w.mu.Unlock()
	d := page.Distribution{Counts: make([]uint64, shareParts+1)}
	for i := range shareParts {
		d.Bounds = append(d.Bounds, float64(i+1)/shareParts)
	}
	w.past(seconds, func(s *second) {
		for i, n := range s.share {
			d.Counts[i] += n
		}
	})
	d.P50, d.P99 = quantile(d, 0.5), quantile(d, 0.99)
	return d
}

// quantile is linear within a bucket.
func quantile(d page.Distribution, q float64) float64 {
	var all, sum uint64
	for _, n := range d.Counts {
		all += n
	}
	rank, low := q*float64(all), 0.0
	for i, n := range d.Counts {
		if n > 0 && float64(sum+n) >= rank {
			if i == len(d.Bounds) {
				return low
			}
			return low + (d.Bounds[i]-low)*(rank-float64(sum))/float64(n)
		}
		sum += n
		if i < len(d.Bounds) {
			low = d.Bounds[i]
		}
	}
	return 0
}

// Transitions is the distribution of what a transition took, in seconds, and how many transitions and bytes there were in a second lately.
func (w *Window) Transitions() (d page.Distribution, rate, bytes float64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all meter.Histogram
	w.past(seconds, func(s *second) { all.Add(&s.totals.Histogram) })
	d.Bounds, d.Counts = Fold(&all)
	d.P50, d.P99 = all.Quantile(0.5).Seconds(), all.Quantile(0.99).Seconds()
	var sum meter.Totals
	var took time.Duration
	w.past(rateOver, func(s *second) {
		sum.Transitions += s.totals.Transitions
		sum.Bytes += s.totals.Bytes
		took += s.took
	})
	return d, per(float64(sum.Transitions), took), per(float64(sum.Bytes), took)
}

const fold = 4 // of the hook's buckets are one: two for each power of two

// Fold makes fewer buckets of a hook's histogram: bounds in seconds, and one count more than bounds, for what is above all.
func Fold(h *meter.Histogram) (bounds []float64, counts []uint64) {
	for i := 0; i < meter.Buckets; i += fold {
		var n uint64
		for _, c := range h[i : i+fold] {
			n += c
		}
		counts = append(counts, n)
		if i+fold < meter.Buckets { // the last one has whatever took longer
			bounds = append(bounds, meter.BucketEnd(i+fold-1).Seconds())
		}
	}
	return bounds, counts
}

// Layers says what a transition of each layer took on average.
func (w *Window) Layers() []page.Layer {
	w.mu.Lock()
	defer w.mu.Unlock()
	var sum []meter.Layer
	w.past(seconds, func(s *second) {
		for i, l := range s.layers {
			if i == len(sum) {
				sum = append(sum, meter.Layer{})
			}
			sum[i].Add(l)
		}
	})
	list := make([]page.Layer, len(sum))
	for i, l := range sum {
		if l.Transitions > 0 {
			list[i] = page.Layer{Wait: l.Wait.Seconds() / float64(l.Transitions), Enclave: l.Enclave.Seconds() / float64(l.Transitions)}
		}
	}
	return list
}
