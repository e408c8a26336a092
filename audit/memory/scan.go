package memory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

const (
	alignment  = 32 // of a row's place, in bytes
	maxColumns = 1 << 16
	chunkBytes = 256 << 10
)

// ErrProcess is a process whose memory cannot be read.
var ErrProcess = errors.New("cannot read the process's memory")

// buffer is what one goroutine needs for a chunk.
type buffer struct{ memory, signs []byte }

func (s *Scanner) newBuffer() *buffer {
	size := chunkBytes + s.layouts[1].row
	return &buffer{make([]byte, size), make([]byte, size/min(s.layouts[0].grain, s.layouts[1].grain)+1)}
}

// Scan searches from start to end of r. Found is called in ascending order of addresses within each type and chunk. What cannot be
// read is skipped.
func (s *Scanner) Scan(ctx context.Context, r io.ReaderAt, start, end uint64, found func(Hit)) error {
	if s.err != nil {
		return s.err
	}
	b := s.buffers.Get().(*buffer)
	defer s.buffers.Put(b)
	for at := (start + alignment - 1) &^ (alignment - 1); at < end; at += chunkBytes {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, _ := r.ReadAt(b.memory[:min(uint64(len(b.memory)), end-at)], int64(at))
		for i := range s.layouts {
			s.chunk(&s.layouts[i], b.memory[:n], b.signs, at, found)
		}
	}
	return nil
}

// chunk looks at every place where a row can begin in the first chunkBytes of mem.
func (s *Scanner) chunk(l *layout, mem, signs []byte, base uint64, found func(Hit)) {
	if len(mem) < l.row {
		return
	}
	signs = signs[:(len(mem)-l.group)/l.grain+1]
	l.signs(signs, mem, l.grain)
	first := int((uint64(l.step) - base%uint64(l.step)) % uint64(l.step))
	for at := first; at < chunkBytes && at+l.row <= len(mem); at += l.step {
		if h, ok := s.at(l, mem[at:at+l.row], signs[at/l.grain:]); ok {
			h.Address = base + uint64(at)
			found(h)
		}
	}
}

// at is the row that lies at the start of mem.
func (s *Scanner) at(l *layout, mem, signs []byte) (Hit, bool) {
	best, token := float32(2), int32(-1)
	per := l.group / l.grain
	for _, x := range s.indexes {
		key := uint32(0)
		for i, g := range x.groups {
			key |= uint32(signs[g*per]) << (i * group)
		}
		if !x.has(key) {
			continue
		}
		for _, t := range x.candidates(key) {
			limit := s.limits[t]
			if d := l.distance(mem, s.values.Row(int(t)), limit); d <= limit && d/limit < best {
				best, token = d/limit, t
			}
		}
	}
	return Hit{Token: token, Type: l.name, Distance: best}, token >= 0
}

// region of a process's memory.
type region struct{ from, to uint64 }

// Process searches all readable memory of a process on all processors. Hits come in ascending order of addresses.
func (s *Scanner) Process(ctx context.Context, pid int) ([]Hit, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrProcess, err)
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, fmt.Errorf("%w: %v; it must be a child of this one, or kernel.yama.ptrace_scope 0", ErrProcess, err)
	}
	defer memory.Close()
	var hits []Hit
	var lock sync.Mutex
	err = forEach(regions(string(maps)), func(r region) error {
		var mine []Hit
		err := s.Scan(ctx, memory, r.from, r.to, func(h Hit) { mine = append(mine, h) })
		lock.Lock()
		defer lock.Unlock()
		hits = append(hits, mine...)
		return err
	})
	slices.SortFunc(hits, func(a, b Hit) int {
		if a.Address != b.Address {
			if a.Address < b.Address {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Type, b.Type)
	})
	return hits, err
}

// part is the most of a region that one goroutine takes at a time.
const part = 64 << 20

// regions that can be read, in parts. Rows that lie across the border of two parts are found by neither: at most one in 64 MiB.
func regions(maps string) []region {
	var out []region
	for line := range strings.Lines(maps) {
		var r region
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &r.from, &r.to, &mode); err != nil || mode == "" || mode[0] != 'r' ||
			strings.Contains(line, "[v") || r.to > 1<<62 {
			continue
		}
		for ; r.to-r.from > part; r.from += part {
			out = append(out, region{r.from, r.from + part})
		}
		out = append(out, r)
	}
	return out
}

func forEach(list []region, f func(region) error) error {
	var next atomic.Int64
	errs := make([]error, runtime.GOMAXPROCS(0))
	var wg sync.WaitGroup
	for w := range errs {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(list)) && errs[w] == nil; i = next.Add(1) - 1 {
				errs[w] = f(list[i])
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
