// Package forker starts children that must die with this process.
//
// Linux ties "signal me when my parent dies" (PR_SET_PDEATHSIG) to the thread that forked, not to the process. [Do]
// runs its function on one thread that lives as long as the process does.
package forker

import (
	"runtime"
	"sync"
)

var (
	once sync.Once
	work = make(chan func())
)

// Do runs f on the forking thread and waits for it. Start children with SysProcAttr.Pdeathsig inside f.
func Do(f func()) {
	once.Do(func() {
		go func() {
			runtime.LockOSThread() // never unlocked: this thread is the parent of every child
			for f := range work {
				f()
			}
		}()
	})
	done := make(chan struct{})
	work <- func() { defer close(done); f() }
	<-done
}
