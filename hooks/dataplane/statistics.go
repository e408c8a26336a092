package dataplane

import (
	"sync/atomic"
	"time"
)

// Statistics is what the engine's end of a region has counted since it began. A transition is one frame out and
// back; its time runs from before the rows leave the engine's buffer until they are back in it.
type Statistics struct {
	Transitions uint64
	Total       time.Duration
	Bytes       uint64 // payload, one way
	Histogram   [Buckets]uint64
}

// Statistics reads the counters. The engine goes on counting meanwhile.
func (r *Region) Statistics() Statistics {
	s := Statistics{
		Transitions: atomic.LoadUint64(r.long(offTransitions)),
		Total:       time.Duration(atomic.LoadUint64(r.long(offNanoseconds))),
		Bytes:       atomic.LoadUint64(r.long(offBytes)),
	}
	for i := range s.Histogram {
		s.Histogram[i] = atomic.LoadUint64(r.long(offHistogram + 8*i))
	}
	return s
}

// Add adds another region's counts.
func (s *Statistics) Add(o Statistics) {
	s.Transitions += o.Transitions
	s.Total += o.Total
	s.Bytes += o.Bytes
	for i, n := range o.Histogram {
		s.Histogram[i] += n
	}
}

// Quantile returns the upper bound of the bucket that holds quantile q, 0 < q <= 1; zero when nothing was counted.
// Buckets are an eighth of a power of two wide, so the error is at most 12.5 %.
func (s *Statistics) Quantile(q float64) time.Duration {
	var all uint64
	for _, n := range s.Histogram {
		all += n
	}
	if all == 0 {
		return 0
	}
	rank, sum := q*float64(all), 0.0
	for i, n := range s.Histogram {
		if sum += float64(n); sum >= rank && n > 0 {
			return bucketEnd(i)
		}
	}
	return bucketEnd(Buckets - 1)
}

func bucketEnd(i int) time.Duration {
	base := time.Duration(1024) << (i / 8)
	return base + base/8*time.Duration(i%8+1)
}
