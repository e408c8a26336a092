package live

import (
	"slices"
	"sync"
	"time"

	"github.com/kvshield/kvshield/telemetry/page"
)

const maxErrors = 20

// Errors are the last ones. The zero value has none; it may be used by several goroutines.
type Errors struct {
	mu   sync.Mutex
	list []page.Error
}

// Add an error. Nothing in it may be any part of a request.
func (e *Errors) Add(at time.Time, kind, message string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, page.Error{Time: at, Kind: kind, Message: message})
	if beyond := len(e.list) - maxErrors; beyond > 0 {
		e.list = slices.Delete(e.list, 0, beyond)
	}
}

// List of the errors, newest last.
func (e *Errors) List() []page.Error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]page.Error{}, e.list...)
}
