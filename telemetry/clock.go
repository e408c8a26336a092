package telemetry

import (
	"time"

	"golang.org/x/sys/unix"
)

// clock turns the hook's time, CLOCK_MONOTONIC, into that of spans. A new one is made for each request, as the two drift.
type clock struct{ offset time.Duration }

const clockTries = 5

// newClock compares the two. Whoever is interrupted in between is off by that, so the quickest of some tries counts.
func newClock() clock {
	var best clock
	least := time.Duration(1<<63 - 1)
	for range clockTries {
		before := monotonicNow()
		wall := time.Duration(time.Now().UnixNano())
		after := monotonicNow()
		if took := after - before; took < least {
			least, best.offset = took, wall-before-took/2
		}
	}
	return best
}

// monotonicNow cannot fail: every Linux has this clock.
func monotonicNow() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return time.Duration(now.Nano())
}

func (c clock) at(d time.Duration) time.Time { return time.Unix(0, int64(c.offset+d)) }
