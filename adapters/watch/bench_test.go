package watch

import (
	"context"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// BenchmarkIdle reports what watching 20 sleeping processes takes, in percent of a core. An
// iteration is a tenth of a second: use -benchtime 50x or more.
func BenchmarkIdle(b *testing.B) {
	for range 20 {
		cmd := exec.Command("sleep", "3600")
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	}
	ctx, stop := context.WithCancel(context.Background())
	w := New(Config{Root: os.Getpid(), Greeted: func(int) bool { return false }, Violated: func(v Violation) { b.Error(v) }})
	ended := make(chan struct{})
	go func() { defer close(ended); w.Run(ctx) }()
	defer func() { stop(); <-ended }()
	time.Sleep(drowsy + alert) // for the children to fall asleep
	before := used(b)
	b.ResetTimer()
	for range b.N {
		time.Sleep(100 * time.Millisecond)
	}
	b.ReportMetric(100*float64(used(b)-before)/float64(b.Elapsed()), "%core")
}

func used(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
