package memory

import (
	"math"
	"math/bits"
	"runtime"
	"slices"
	"sync"

	"github.com/kvshield/kvshield/audit"
)

const (
	hashes     = 3
	perHash    = 3 // groups in a hash
	group      = 8 // neighbouring numbers whose signs make a byte
	hashBits   = perHash * group
	bucketMax  = 32
	minColumns = (perHash + 1) * group
	// constantPart is the share of a row's energy around its mean below which it counts as constant.
	constantPart = 0.0025
)

// index finds the tokens whose rows have a given hash.
type index struct {
	groups [perHash]int // the hash consists of columns groups[i]*group and the next ones
	known  []uint64     // one bit for each hash value: whether a row has it
	before []uint32     // for each word of known: set bits before it
	starts []uint32     // for each set bit: where its tokens start in tokens
	counts []uint8      // and how many there are
	tokens []int32
}

// has is the question asked for every place in memory; nearly always the answer is no.
func (x *index) has(key uint32) bool { return x.known[key>>6&(1<<hashBits/64-1)]>>(key&63)&1 != 0 }

func (x *index) rank(key uint32) uint32 {
	word := x.known[key>>6]
	return x.before[key>>6] + uint32(bits.OnesCount64(word&(1<<(key&63)-1)))
}

// candidates of a key that the index has, in ascending order.
func (x *index) candidates(key uint32) []int32 {
	r := x.rank(key)
	return x.tokens[x.starts[r] : x.starts[r]+uint32(x.counts[r])]
}

// newIndex files the usable rows under the signs of the given groups.
func newIndex(values audit.Matrix, usable []bool, groups [perHash]int) *index {
	x := &index{groups: groups, known: make([]uint64, 1<<hashBits/64), before: make([]uint32, 1<<hashBits/64)}
	keys := make([]uint32, values.Rows)
	for i := range keys {
		if usable[i] {
			keys[i] = x.key(values.Row(i))
			x.known[keys[i]>>6] |= 1 << (keys[i] & 63)
		}
	}
	distinct := 0
	for i, word := range x.known {
		x.before[i] = uint32(distinct)
		distinct += bits.OnesCount64(word)
	}
	x.starts, x.counts = make([]uint32, distinct+1), make([]uint8, distinct)
	for i, key := range keys {
		if usable[i] {
			x.starts[x.rank(key)+1]++
		}
	}
	for i := range distinct {
		x.starts[i+1] += x.starts[i]
	}
	x.tokens = make([]int32, x.starts[distinct])
	for i, key := range keys {
		if usable[i] {
			x.put(x.rank(key), int32(i), values)
		}
	}
	return x
}

// put files a token unless its bucket is full or holds a token with the same row.
func (x *index) put(bucket uint32, token int32, values audit.Matrix) {
	held := x.tokens[x.starts[bucket]:][:x.counts[bucket]]
	if len(held) == bucketMax {
		return
	}
	for _, other := range held {
		if slices.Equal(values.Row(int(other)), values.Row(int(token))) {
			return
		}
	}
	x.tokens[x.starts[bucket]+uint32(len(held))] = token
	x.counts[bucket]++
}

// key of a row: the same bits as the signs in memory give.
func (x *index) key(row []float32) uint32 {
	key := uint32(0)
	for i, g := range x.groups {
		for j, v := range row[g*group : (g+1)*group] {
			key |= math.Float32bits(v) >> 31 << (i*group + signPlace[j])
		}
	}
	return key
}

// rowLimits gives for each row the square of the distance within which it matches, and whether it can be searched at all:
// not a row of zeros, of one value, or of what is no number.
func rowLimits(values audit.Matrix) (limits []float32, usable []bool) {
	limits, usable = make([]float32, values.Rows), make([]bool, values.Rows)
	parallel(values.Rows, func(from, to int) {
		for i := from; i < to; i++ {
			var sum, squares float64
			for _, v := range values.Row(i) {
				sum += float64(v)
				squares += float64(v) * float64(v)
			}
			limits[i] = float32(squares * tolerance * tolerance)
			around := squares - sum*sum/float64(values.Cols)
			usable[i] = limits[i] > 0 && limits[i] <= math.MaxFloat32 && around > constantPart*squares
		}
	})
	return limits, usable
}

// bestGroups orders the groups of columns by how well their signs tell rows apart and how surely they are read: columns that are
// as often positive as negative, and large.
func bestGroups(values audit.Matrix, usable []bool) []int {
	n := values.Cols / group
	positive, squares := make([]float64, values.Cols), make([]float64, values.Cols)
	total := 0.0
	for i := range values.Rows {
		if !usable[i] {
			continue
		}
		total++
		for c, v := range values.Row(i) {
			squares[c] += float64(v) * float64(v)
			if v > 0 {
				positive[c]++
			}
		}
	}
	scores, order := make([]float64, n), make([]int, n)
	for g := range n {
		order[g] = g
		for c := g * group; c < (g+1)*group; c++ {
			scores[g] += min(positive[c], total-positive[c]) * math.Sqrt(squares[c])
		}
	}
	slices.SortStableFunc(order, func(a, b int) int {
		switch {
		case scores[a] > scores[b]:
			return -1
		case scores[a] < scores[b]:
			return 1
		}
		return 0
	})
	return order
}

// parallel calls f for parts of 0…n on all processors.
func parallel(n int, f func(from, to int)) {
	var wg sync.WaitGroup
	workers := runtime.GOMAXPROCS(0)
	for w := range workers {
		wg.Go(func() { f(n*w/workers, n*(w+1)/workers) })
	}
	wg.Wait()
}
