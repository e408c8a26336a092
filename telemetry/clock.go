package telemetry

import (
	"time"

	"golang.org/x/sys/unix"
)

// clock turns the hook's time, CLOCK_MONOTONIC, into that of spans. A new one is made for each request, as the two drift.
type clock struct{ offset time.Duration }

func newClock() clock {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return clock{}
	}
	return clock{time.Duration(time.Now().UnixNano() - now.Nano())}
}

func (c clock) at(d time.Duration) time.Time { return time.Unix(0, int64(c.offset+d)) }
