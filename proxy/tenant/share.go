package tenant

import (
	"context"
	"encoding/binary"
	"hash/maphash"
	"net/http"
)

// What Config.Granted is told instead of the number of a slot.
const (
	AllSlots = -1 // the request has all of them
	AnySlot  = -2 // the engine chooses, and does not say which
)

// Share passes requests on like [Handler], but for tenants that may share what the engine has cached: it names a slot in requests
// that take one, so that it is known which request is in which, and leaves all others as they are. Of the free slots a request gets the one that
// had a request which began most like it, as llama-server would choose, else the one that was used least lately.
//
// A request that names a slot itself gets that one. The engine's cache in host memory is for requests that name none, and not used.
func Share(c Config, next http.Handler) http.Handler {
	if c.MaxBody <= 0 {
		c.MaxBody = defaultMaxBody
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		how := useOf(r)
		switch {
		case how == pinned && r.Header.Get("Content-Encoding") == "":
			c.place(w, r, next)
		case how == slotless || r.Method == http.MethodGet || r.Method == http.MethodHead:
			next.ServeHTTP(w, r)
		default:
			c.granted(r.Context(), AnySlot)
			next.ServeHTTP(w, r)
		}
	})
}

func (c Config) granted(ctx context.Context, slot int) {
	if c.Granted != nil {
		c.Granted(ctx, slot)
	}
}

func (c Config) place(w http.ResponseWriter, r *http.Request, next http.Handler) {
	text, f := c.read(w, r)
	if f != nil {
		f.Write(w)
		return
	}
	r = r.Clone(r.Context())
	b, err := parse(text)
	if err != nil || b.many || b.several || !c.Pool.has(b.slot) {
		replace(r, text)
		c.granted(r.Context(), AnySlot)
		next.ServeHTTP(w, r)
		return
	}
	l, err := c.Pool.wait(r.Context(), &waiter{wish: &wish{b.slot, printOf(b.members)}, ready: make(chan *Lease, 1)})
	if err != nil {
		panic(http.ErrAbortHandler) // the client has left
	}
	defer l.Finish()
	r = r.WithContext(withLease(r.Context(), l))
	c.granted(r.Context(), l.Slot())
	replace(r, b.in(l.Slot()))
	next.ServeHTTP(w, r)
}

// has is false for the number of a slot that the engine does not have, which it will refuse. An engine that is being started has
// none yet: any can be waited for.
func (p *Pool) has(slot int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.unknown && (slot < len(p.slots) || len(p.slots) == 0)
}

// wish is what a request wants of the pool where tenants share.
type wish struct {
	slot int // by its number; -1: any
	like print
}

// place chooses the slot for a wish.
func (p *Pool) place(w *wish) []*slot {
	var best *slot
	alike := 0
	for _, s := range p.slots {
		if s.busy || w.slot >= 0 && s.id != w.slot {
			continue
		}
		n := w.like.common(s.had)
		if best == nil || n > alike || n == alike && s.used < best.used {
			best, alike = s, n
		}
	}
	if best == nil {
		return nil
	}
	best.had = w.like
	return []*slot{best}
}

// print tells how far two requests begin alike without keeping either: a keyed hash of the text up to each multiple of printStep.
type print []uint64

const (
	printStep = 64
	printMax  = 1 << 14
)

var printSeed = maphash.MakeSeed()

func printOf(text []byte) print {
	p := make(print, 0, min(len(text)/printStep, printMax))
	var chain [8]byte
	for len(text) >= printStep && len(p) < printMax {
		var h maphash.Hash
		h.SetSeed(printSeed)
		h.Write(chain[:])
		h.Write(text[:printStep])
		p = append(p, h.Sum64())
		binary.LittleEndian.PutUint64(chain[:], h.Sum64())
		text = text[printStep:]
	}
	return p
}

// common is how many steps both begin with.
func (p print) common(o print) int {
	n := 0
	for n < len(p) && n < len(o) && p[n] == o[n] {
		n++
	}
	return n
}
