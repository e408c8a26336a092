package resident

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/kvshield/kvshield/enclave"
)

// scene is one layer of a store and what should be in it, before any rounding.
type scene struct {
	t      testing.TB
	rnd    *rand.Rand
	store  enclave.Store
	id     enclave.CacheID
	layer  enclave.LayerCache
	params enclave.Attention // scale, bias, softcap, sinks
	k, v   map[int64][]float32
}

var demo = enclave.LayerCache{QueryHeads: 6, KVHeads: 2, DimK: 40, DimV: 24, Cells: 300, Streams: 3}

func keeper(t testing.TB, o Options) *Resident {
	t.Helper()
	if o.Limit == 0 {
		o.Limit = 1 << 28
	}
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func noModels() []enclave.ModelID { return nil }

func newScene(t testing.TB, layer enclave.LayerCache, seed uint64) *scene {
	t.Helper()
	s := &scene{t: t, rnd: rand.New(rand.NewPCG(seed, 5)), layer: layer, k: map[int64][]float32{}, v: map[int64][]float32{}}
	s.store = keeper(t, Options{Threads: 2}).OpenStore(noModels)
	s.id = declare(t, s.store, layer)
	s.params.Scale = 0.125
	return s
}

func declare(t testing.TB, s enclave.Store, layers ...enclave.LayerCache) enclave.CacheID {
	t.Helper()
	made, err := s.Declare(layers)
	if err != nil {
		t.Fatal(err)
	}
	return made.First
}

// exact draws a head's row that every storage holds without rounding: multiples of 1/64, the largest of each 32 being 127/64.
func exact(rnd *rand.Rand, heads, dim int) []float32 {
	x := make([]float32, heads*dim)
	for i := range x {
		x[i] = float32(rnd.IntN(255)-127) / 64
		if i%dim%32 == 0 {
			x[i] = 127.0 / 64
		}
	}
	return x
}

// turn is a batch of a scene: what is seen by each token lies in bias, by cell of the block's stream.
type turn struct {
	blocks int
	cells  []int64
	bias   []map[int64]float32
	mask   enclave.MaskType
	wide   int // cells of a mask row
}

// batch encodes a turn; each block has more mask rows than tokens.
func (s *scene) batch(u *turn) *enclave.Batch {
	n := len(u.cells) / u.blocks
	b := &enclave.Batch{Tokens: len(u.cells), Blocks: u.blocks, Cells: u.cells, Mask: u.mask, MaskCells: u.wide, MaskRows: n + 3}
	if u.mask == enclave.MaskNone {
		return b
	}
	for block := range u.blocks {
		for row := range b.MaskRows {
			for cell := range int64(u.wide) {
				bias, seen := float32(0), false
				if row < n {
					bias, seen = get(u.bias[block*n+row], cell)
				}
				b.MaskData = appendMask(b.MaskData, u.mask, bias, seen)
			}
		}
	}
	return b
}

func get(m map[int64]float32, cell int64) (float32, bool) {
	f, ok := m[cell]
	return f, ok
}

// appendMask knows the halves of small whole numbers only.
func appendMask(b []byte, typ enclave.MaskType, bias float32, seen bool) []byte {
	if !seen {
		bias = float32(math.Inf(-1))
	}
	if typ == enclave.MaskF32 {
		return binary.LittleEndian.AppendUint32(b, math.Float32bits(bias))
	}
	half := map[float32]uint16{0: 0, -1: 0xbc00, -2: 0xc000, -4: 0xc400, float32(math.Inf(-1)): 0xfc00}
	h, ok := half[bias]
	if !ok {
		panic("mask value")
	}
	return binary.LittleEndian.AppendUint16(b, h)
}

// play runs a turn, keys and values in `puts` frames and queries in `asks`, and compares with the reference.
func (s *scene) play(u *turn, slot, puts, asks int) {
	s.t.Helper()
	if err := s.store.Begin(slot, s.batch(u)); err != nil {
		s.t.Fatal(err)
	}
	h, tokens := s.layer, len(u.cells)
	for i, cell := range u.cells {
		s.k[cell], s.v[cell] = exact(s.rnd, h.KVHeads, h.DimK), exact(s.rnd, h.KVHeads, h.DimV)
		_ = i
	}
	for frame := range puts {
		a := s.params
		a.Slot = slot
		s.part(&a, u, tokens*frame/puts, tokens*(frame+1)/puts)
		if err := s.store.Attend(s.id, &a); err != nil {
			s.t.Fatal(err)
		}
	}
	q := make([]float32, tokens*h.QueryHeads*h.DimK)
	for i := range q {
		q[i] = float32(s.rnd.NormFloat64())
	}
	for frame := range asks {
		first, end := tokens*frame/asks, tokens*(frame+1)/asks
		a := s.params
		a.Slot, a.QueryFirst, a.QueryCount = slot, first, end-first
		a.Q = q[first*h.QueryHeads*h.DimK : end*h.QueryHeads*h.DimK]
		a.Out = make([]float32, (end-first)*h.QueryHeads*h.DimV)
		if err := s.store.Attend(s.id, &a); err != nil {
			s.t.Fatal(err)
		}
		for token := first; token < end; token++ {
			s.compare(u, token, q, a.Out[(token-first)*h.QueryHeads*h.DimV:])
		}
	}
}

func (s *scene) part(a *enclave.Attention, u *turn, first, end int) {
	a.PutFirst, a.PutCount = first, end-first
	for _, cell := range u.cells[first:end] {
		a.K, a.V = append(a.K, s.k[cell]...), append(a.V, s.v[cell]...)
	}
}

func (s *scene) compare(u *turn, token int, q, got []float32) {
	s.t.Helper()
	h := s.layer
	for head := range h.QueryHeads {
		want := s.reference(u, token, head, q[(token*h.QueryHeads+head)*h.DimK:][:h.DimK])
		for d, x := range want {
			if y := float64(got[head*h.DimV+d]); !(math.Abs(x-y) < 2e-5) {
				s.t.Fatalf("token %d, head %d, dimension %d: %v, want %v", token, head, d, y, x)
			}
		}
	}
}

// reference is attention in double precision, from its definition.
func (s *scene) reference(u *turn, token, head int, q []float32) []float64 {
	h, p := s.layer, s.params
	stream := u.cells[token] / int64(h.Cells) * int64(h.Cells)
	kv := head / (h.QueryHeads / h.KVHeads)
	out, sum := make([]float64, h.DimV), 0.0
	if p.Sinks != nil {
		sum = math.Exp(float64(p.Sinks[head]))
	}
	for cell := range int64(h.Cells) {
		bias, seen := get(u.bias[token], cell)
		if u.mask == enclave.MaskNone {
			bias, seen = 0, cell < int64(u.wide)
		}
		if !seen {
			continue
		}
		x := 0.0
		for d, k := range s.k[stream+cell][kv*h.DimK:][:h.DimK] {
			x += float64(q[d]) * float64(k)
		}
		x *= float64(p.Scale)
		if p.LogitSoftcap != 0 {
			x = float64(p.LogitSoftcap) * math.Tanh(x/float64(p.LogitSoftcap))
		}
		w := math.Exp(x + slope(head, h.QueryHeads, float64(p.MaxBias))*float64(bias))
		sum += w
		for d, v := range s.v[stream+cell][kv*h.DimV:][:h.DimV] {
			out[d] += w * float64(v)
		}
	}
	for d := range out {
		if sum > 0 {
			out[d] /= sum
		}
	}
	return out
}

// slope follows the ALiBi paper.
func slope(head, heads int, maxBias float64) float64 {
	if maxBias <= 0 {
		return 1
	}
	power := math.Exp2(math.Floor(math.Log2(float64(heads))))
	if float64(head) < power {
		return math.Exp2(-maxBias / power * float64(head+1))
	}
	return math.Exp2(-maxBias / 2 / power * float64(2*(head-int(power))+1))
}
