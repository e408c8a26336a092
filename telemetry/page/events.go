package page

import (
	"encoding/json"
	"math"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvshield/kvshield/proxy/reply"
)

// MaxStreams is how many may look at a time: each is a goroutine and a connection.
const MaxStreams = 64

// WriteWithin is how long a reader may take to make room for one event. One that takes longer is let go.
const WriteWithin = 10 * time.Second

// feed makes one event a period, for all who look.
type feed struct {
	source  func() Snapshot
	begin   time.Time
	period  time.Duration
	streams atomic.Int64

	mu     sync.Mutex
	number int64 // of the period that event is for
	event  []byte
}

func newFeed(source func() Snapshot) *feed {
	return &feed{source: source, begin: time.Now(), period: time.Second, number: -1}
}

func (f *feed) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// A browser says whether it is this page that asks. Another site's could not read the events, but hold connections.
	if site := r.Header.Get("Sec-Fetch-Site"); site == "cross-site" || site == "same-site" {
		reply.Failure{Message: "this stream is for kvshield's own page, not for another site's", Type: reply.Permission, Code: http.StatusForbidden}.Write(w)
		return
	}
	if f.streams.Add(1) > MaxStreams {
		f.streams.Add(-1)
		reply.Failure{Message: "too many are looking already; close a page, or try again in a moment", Type: reply.Unavailable, Code: http.StatusServiceUnavailable}.WriteRetry(w, WriteWithin)
		return
	}
	defer f.streams.Add(-1)
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store, no-transform")
	h.Set("X-Accel-Buffering", "no") // or nginx keeps events back
	if r.Method != http.MethodHead {
		f.stream(w, r)
	}
}

// stream sends the event of each period. A slow reader misses some, it gets none late.
func (f *feed) stream(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-r.Context().Done():
			return
		case <-timer.C:
		}
		_ = control.SetWriteDeadline(time.Now().Add(WriteWithin)) // where the connection has such a thing
		event, next := f.now()
		if _, err := w.Write(event); err != nil {
			panic(http.ErrAbortHandler) // nobody reads any more
		}
		if err := control.Flush(); err != nil {
			panic(http.ErrAbortHandler)
		}
		timer.Reset(time.Until(next))
	}
}

// now returns this period's event and when the next period begins.
func (f *feed) now() ([]byte, time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := int64(time.Since(f.begin) / f.period); n != f.number {
		f.number, f.event = n, encode(f.source())
	}
	return f.event, f.begin.Add(time.Duration(f.number+1) * f.period)
}

func encode(s Snapshot) []byte {
	s.finite()
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // finite numbers, texts and times of this era always marshal
	}
	return slices.Concat([]byte("data: "), b, []byte("\n\n"))
}

// finite puts 0 for what JSON has no number for, and empty lists for none.
func (s *Snapshot) finite() {
	numbers := []*float64{&s.Tokens.Rate, &s.TransitionRate, &s.BytesRate, &s.Share.P50, &s.Share.P99, &s.Transition.P50, &s.Transition.P99}
	s.Layers = append([]Layer{}, s.Layers...)
	for i := range s.Layers {
		numbers = append(numbers, &s.Layers[i].Wait, &s.Layers[i].Enclave)
	}
	for _, d := range []*Distribution{&s.Share, &s.Transition} {
		d.Bounds = slices.DeleteFunc(append([]float64{}, d.Bounds...), notFinite)
		d.Counts = append([]uint64{}, d.Counts...)
	}
	s.Errors = append([]Error{}, s.Errors...)
	for _, n := range numbers {
		if notFinite(*n) {
			*n = 0
		}
	}
}

func notFinite(f float64) bool { return math.IsNaN(f) || math.IsInf(f, 0) }
