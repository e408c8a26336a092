// Package meter reads what each graph of an engine cost.
package meter

import (
	"time"

	"github.com/kvshield/kvshield/telemetry"
)

type Graph struct {
	Number      uint64
	Start, End  time.Duration
	Tokens      int
	Transitions int
	Bytes       uint64
	Wait        time.Duration
	Enclave     time.Duration
	Parts       []Part
	Detail      []Transition
	PID         int
}

type Part struct{ Sequence, Tokens int }

type Transition struct {
	Layer         int
	Start         time.Duration
	Wait, Enclave time.Duration
	Bytes         uint64
}

type Layer struct {
	Transitions, Bytes uint64
	Wait, Enclave      time.Duration
}

type Totals struct {
	Transitions, Bytes, Lost uint64
	Wait, Enclave            time.Duration
	Histogram                Histogram
}

type Histogram = telemetry.Histogram

const Buckets = telemetry.Buckets

func BucketEnd(i int) time.Duration { return telemetry.BucketEnd(i) }
