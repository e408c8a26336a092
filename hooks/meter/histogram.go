package meter

import "time"

// Buckets of a Histogram: 8 for each power of two of nanoseconds, from 1,024 ns up. The hook counts in the same ones
// (hooks/core/meter.c).
const Buckets = 160

// Histogram counts latencies. Its zero value has counted nothing.
type Histogram [Buckets]uint64

// Add adds another histogram's counts.
func (h *Histogram) Add(o *Histogram) {
	for i, n := range o {
		h[i] += n
	}
}

// Quantile returns the upper bound of the bucket that holds quantile q, 0 < q <= 1; zero when nothing was counted.
// Buckets are an eighth of a power of two wide, so the error is at most 12.5 %.
func (h *Histogram) Quantile(q float64) time.Duration {
	var all uint64
	for _, n := range h {
		all += n
	}
	if all == 0 {
		return 0
	}
	rank, sum := q*float64(all), 0.0
	for i, n := range h {
		if sum += float64(n); sum >= rank && n > 0 {
			return BucketEnd(i)
		}
	}
	return BucketEnd(Buckets - 1)
}

// BucketEnd is the upper bound of bucket i.
func BucketEnd(i int) time.Duration {
	base := time.Duration(1024) << (i / 8)
	return base + base/8*time.Duration(i%8+1)
}
