package main

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const progressEvery = 200 * time.Millisecond

// progress shows that something long is going on: a counting line on a terminal, one plain line elsewhere. The
// returned function ends it.
func progress(format string, a ...any) (done func()) {
	what := fmt.Sprintf(format, a...)
	if _, err := unix.IoctlGetTermios(int(os.Stderr.Fd()), unix.TCGETS); err != nil {
		say("%s", what)
		return func() {}
	}
	start := time.Now()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for {
			fmt.Fprintf(os.Stderr, "\r\033[Kkvshield: %s (%.1f s)", what, time.Since(start).Seconds())
			select {
			case <-stop:
				fmt.Fprint(os.Stderr, "\r\033[K")
				return
			case <-tick.C:
			}
		}
	}()
	return func() { close(stop); <-stopped }
}
