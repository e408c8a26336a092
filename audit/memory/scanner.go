package memory

import (
	"errors"
	"fmt"
	"math"
	"sync"

	"github.com/kvshield/kvshield/audit"
)

// ErrDictionary is a dictionary that cannot be searched for.
var ErrDictionary = errors.New("dictionary cannot be searched for")

// Hit is a row of the dictionary found in memory.
type Hit struct {
	Address  uint64
	Token    int32   // row of the dictionary; of equal rows, the first
	Type     string  // F16 or F32
	Distance float32 // relative: of the difference's L2 norm to the row's
}

// Scanner searches memory for the rows of a dictionary. It may be used by many goroutines at a time.
type Scanner struct {
	values  audit.Matrix
	limits  []float32 // for each row, the square of the distance within which it matches
	indexes [hashes]*index
	layouts [2]layout
	tokens  int
	err     error
	buffers sync.Pool // of *buffer
}

// layout is how rows of one type lie in memory.
type layout struct {
	name      string
	row, step int // bytes of a row, and the distance of places where one may begin
	group     int // bytes of a group
	grain     int // distance of the groups whose signs are taken
	signs     func(dst, mem []byte, step int)
	distance  func(mem []byte, row []float32, limit float32) float32
}

// NewScanner prepares the search for the rows of values: row x holds what layer 0 caches for token x, all key/value heads side
// by side, at least 32 numbers. The matrix is kept, not copied. A matrix that cannot be searched for makes every scan fail with
// ErrDictionary.
func NewScanner(values audit.Matrix) *Scanner {
	s := &Scanner{values: values}
	switch {
	case values.Rows < 0 || values.Rows > math.MaxInt32 || values.Cols < 0 || len(values.Data)/max(values.Cols, 1) != values.Rows || len(values.Data) != values.Rows*values.Cols:
		s.err = fmt.Errorf("%w: it has %d numbers for %d rows of %d", ErrDictionary, len(values.Data), values.Rows, values.Cols)
	case values.Cols < minColumns || values.Cols > maxColumns:
		s.err = fmt.Errorf("%w: its rows have %d numbers, not %d to %d: give all heads of a token side by side", ErrDictionary, values.Cols, minColumns, maxColumns)
	}
	if s.err != nil {
		return s
	}
	var usable []bool
	s.limits, usable = rowLimits(values)
	order := bestGroups(values, usable)
	parallel(hashes, func(from, to int) {
		for h := from; h < to; h++ {
			var groups [perHash]int
			for i := range groups {
				groups[i] = order[(h*perHash+i)%len(order)]
			}
			s.indexes[h] = newIndex(values, usable, groups)
		}
	})
	s.count()
	s.layouts = [2]layout{newLayout(F16, 2, values.Cols), newLayout(F32, 4, values.Cols)}
	s.buffers.New = func() any { return s.newBuffer() }
	return s
}

func newLayout(name string, element, columns int) layout {
	l := layout{name: name, row: element * columns, group: element * group, signs: signs16, distance: distance16}
	if element == 4 {
		l.signs, l.distance = signs32, distance32
	}
	l.step = l.row & -l.row // the largest power of two in it
	l.step = min(l.step, alignment)
	l.grain = min(l.step, l.group)
	return l
}

// Tokens is how many different rows can be found: those left out are zero, constant, no numbers, equal to an earlier row, or crowded
// out by rows that look alike to all hashes.
func (s *Scanner) Tokens() int { return s.tokens }

func (s *Scanner) count() {
	found := make([]bool, s.values.Rows)
	for _, x := range s.indexes {
		for bucket, n := range x.counts {
			for _, token := range x.tokens[x.starts[bucket]:][:n] {
				found[token] = true
			}
		}
	}
	for _, f := range found {
		if f {
			s.tokens++
		}
	}
}
