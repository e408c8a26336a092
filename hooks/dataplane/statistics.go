package dataplane

import (
	"sync/atomic"
	"time"

	"github.com/kvshield/kvshield/telemetry"
)

// Statistics is what the engine's end of a region has counted since it began. A transition is one frame out and
// back; its time runs from before the rows leave the engine's buffer until they are back in it.
type Statistics struct {
	Transitions uint64
	Total       time.Duration
	Bytes       uint64 // payload, one way
	Histogram   telemetry.Histogram
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
	s.Histogram.Add(&o.Histogram)
}

// Quantile of the transitions' latency.
func (s *Statistics) Quantile(q float64) time.Duration { return s.Histogram.Quantile(q) }
