package bench

import (
	"testing"

	"go.uber.org/goleak"
)

// A benchmark that leaves a goroutine behind leaves a process or a socket behind.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/kvshield/kvshield/internal/forker.Do.func1.1"))
}
