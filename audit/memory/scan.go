package memory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"
	"sync"
	"syscall"
)

const (
	alignment  = 32 // of ggml's tensors
	page       = 4096
	chunk      = 256 << 10 // offered to one processor at a time
	maxColumns = 32 << 10
)

// span is a stretch of memory.
type span struct {
	start, end uint64
	sparse     bool // what was never written to can be told, and need not be read
}

// part is a piece of a span for one processor: rows that begin in it, though they may end behind it.
type part struct {
	span
	limit  uint64 // end of the whole span
	number int
}

// counted is what came of a part, in bytes.
type counted struct{ read, holes, empty uint64 }

// Scan searches the memory r from address start to end and calls found for each hit, one at a time and in ascending order of
// addresses. What r refuses with EIO or EFAULT is taken for a hole and skipped. When r ends before `end`, found has had what lies
// before, and the error wraps io.ErrUnexpectedEOF. r is read by several goroutines at once.
func (s *Scanner) Scan(ctx context.Context, r io.ReaderAt, start, end uint64, found func(Hit)) error {
	if start > end || end > math.MaxInt64 {
		return fmt.Errorf("cannot search memory from %#x to %#x", start, end)
	}
	return s.scan(ctx, source{ReaderAt: r}, []span{{start: start, end: end}}, func(hits []Hit, _ counted) error {
		for _, h := range hits {
			found(h)
		}
		return nil
	})
}

// scan searches the spans on all processors. done is called for each part in the order of the spans; its hits are only lent.
func (s *Scanner) scan(ctx context.Context, src source, spans []span, done func([]Hit, counted) error) error {
	if s.err != nil {
		return s.err
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	order := newOrder()
	defer context.AfterFunc(ctx, order.give)()
	var wg sync.WaitGroup
	parts := make(chan part)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			b := s.buffers.Get().(*buffer)
			defer s.buffers.Put(b)
			for p := range parts {
				n, err := s.scanPart(src, p, b)
				order.wait(ctx, p.number, func() {
					if err = errors.Join(done(b.hits, n), err); err != nil {
						stop(err)
					}
				})
			}
		})
	}
	offer(ctx, spans, parts)
	wg.Wait()
	return context.Cause(ctx)
}

// offer hands out all parts of the spans, then closes the channel.
func offer(ctx context.Context, spans []span, parts chan<- part) {
	defer close(parts)
	number := 0
	for _, sp := range spans {
		for at := sp.start; at < sp.end; number++ {
			next := min(sp.end, (at/chunk+1)*chunk)
			select {
			case parts <- part{span{at, next, sp.sparse}, sp.end, number}:
			case <-ctx.Done():
				return
			}
			at = next
		}
	}
}

// order lets goroutines that finish in any order deliver in that of their numbers.
type order struct {
	mu   sync.Mutex
	cond *sync.Cond
	turn int
}

func newOrder() *order {
	o := &order{}
	o.cond = sync.NewCond(&o.mu)
	return o
}

// wait calls f when all lower numbers are through, or not at all once ctx has ended.
func (o *order) wait(ctx context.Context, number int, f func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.turn != number && ctx.Err() == nil {
		o.cond.Wait()
	}
	if ctx.Err() == nil {
		f()
		o.turn++
		o.cond.Broadcast()
	}
}

// give lets all that wait look again.
func (o *order) give() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.cond.Broadcast()
}

// buffer is what one goroutine needs to scan a part.
type buffer struct {
	memory, signs []byte
	hits          []Hit
}

func (s *Scanner) newBuffer() *buffer {
	size := chunk + s.layouts[1].row
	grain := min(s.layouts[0].grain, s.layouts[1].grain)
	return &buffer{memory: make([]byte, size), signs: make([]byte, size/grain)}
}

// scanPart reads a part piece by piece around its holes and leaves the hits in b.
func (s *Scanner) scanPart(src source, p part, b *buffer) (n counted, err error) {
	b.hits = b.hits[:0]
	last := min(p.limit, p.end+uint64(s.layouts[1].row))
	if p.sparse && src.absent != nil && src.absent(p.start, last, b.memory) {
		n.empty = p.end - p.start
		return n, nil
	}
	for at := p.start; at < p.end; {
		want := b.memory[:last-at]
		got, err := src.ReadAt(want, int64(at))
		if got > len(want) || got < 0 {
			return n, fmt.Errorf("reading memory at %#x gave %d bytes of %d", at, got, len(want))
		}
		s.scanPiece(b, at, got, p.end)
		stopped := at + uint64(got)
		n.read += min(stopped, p.end) - at
		if got == len(want) {
			return n, nil
		}
		switch {
		case errors.Is(err, syscall.EIO), errors.Is(err, syscall.EFAULT):
		case err == nil, errors.Is(err, io.EOF):
			return n, fmt.Errorf("memory ended at %#x: %w", stopped, io.ErrUnexpectedEOF)
		default:
			return n, err
		}
		at = min((stopped/page+1)*page, last)
		if stopped < p.end {
			n.holes += min(at, p.end) - stopped
		}
	}
	return n, nil
}

// scanPiece searches the first n bytes of b.memory, which were read from address. Rows begin before end.
func (s *Scanner) scanPiece(b *buffer, address uint64, n int, end uint64) {
	before := len(b.hits)
	for i := range s.layouts {
		l := &s.layouts[i]
		skip := int(-address & uint64(l.step-1))
		room := min(n-skip-l.row, int(end-address)-skip-1)
		if room >= 0 {
			s.scanRows(b, l, address+uint64(skip), b.memory[skip:n], room/l.step+1)
		}
	}
	slices.SortFunc(b.hits[before:], func(a, b Hit) int {
		return cmp.Or(cmp.Compare(a.Address, b.Address), cmp.Compare(a.Type, b.Type))
	})
}

// places says where, counted from a row's own place among the signs, the bytes of each hash lie.
type places [hashes][perHash]int

// scanRows searches rows of a layout at the first n places in memory, the first of which is at address.
func (s *Scanner) scanRows(b *buffer, l *layout, address uint64, memory []byte, n int) {
	signs := b.signs[:((n-1)*l.step+l.row-l.group)/l.grain+1]
	l.signs(signs, memory, l.grain)
	var at places
	for h, x := range s.indexes {
		for i, g := range x.groups {
			at[h][i] = g * l.group / l.grain
		}
	}
	stride := l.step / l.grain
	x0, x1, x2 := s.indexes[0], s.indexes[1], s.indexes[2]
	for place := range n {
		w := signs[place*stride:]
		if x0.has(key(w, &at[0])) || x1.has(key(w, &at[1])) || x2.has(key(w, &at[2])) {
			offset := place * l.step
			s.match(b, l, address+uint64(offset), memory[offset:offset+l.row], w, &at)
		}
	}
}

// key of the row whose signs begin in w.
func key(w []byte, at *[perHash]int) uint32 {
	return uint32(w[at[0]]) | uint32(w[at[1]])<<group | uint32(w[at[2]])<<(2*group)
}

// match compares the row at address with all candidates and keeps the nearest; of equals, the lowest token.
func (s *Scanner) match(b *buffer, l *layout, address uint64, row, signs []byte, at *places) {
	best, token := float32(math.Inf(1)), int32(-1)
	for h, x := range s.indexes {
		k := key(signs, &at[h])
		if !x.has(k) {
			continue
		}
		for _, c := range x.candidates(k) {
			limit := s.limits[c]
			d := l.distance(row, s.values.Row(int(c)), limit)
			if !(d <= limit) {
				continue
			}
			// Shares of the limit compare as the relative distances do.
			if d /= limit; d < best || d == best && c < token {
				best, token = d, c
			}
		}
	}
	if token >= 0 {
		b.hits = append(b.hits, Hit{address, token, l.name, tolerance * float32(math.Sqrt(float64(best)))})
	}
}
