package resident

import (
	"errors"
	"math"
	"testing"

	"github.com/kvshield/kvshield/enclave"
)

func TestDeclareRejects(t *testing.T) {
	huge := math.MaxInt
	changes := map[string]func(l *enclave.LayerCache){
		"no query heads":   func(l *enclave.LayerCache) { l.QueryHeads = 0 },
		"no KV heads":      func(l *enclave.LayerCache) { l.KVHeads = 0 },
		"no whole group":   func(l *enclave.LayerCache) { l.KVHeads = 4 },
		"huge heads":       func(l *enclave.LayerCache) { l.QueryHeads, l.KVHeads = huge, huge },
		"huge key":         func(l *enclave.LayerCache) { l.DimK = huge },
		"negative value":   func(l *enclave.LayerCache) { l.DimV = -1 },
		"no cells":         func(l *enclave.LayerCache) { l.Cells = 0 },
		"huge cells":       func(l *enclave.LayerCache) { l.Cells = huge },
		"negative cells":   func(l *enclave.LayerCache) { l.Cells = math.MinInt },
		"no streams":       func(l *enclave.LayerCache) { l.Streams = 0 },
		"too many streams": func(l *enclave.LayerCache) { l.Streams = 257 },
		"huge streams":     func(l *enclave.LayerCache) { l.Streams = huge },
		"unknown storage":  func(l *enclave.LayerCache) { l.Storage = 3 },
		"greatest storage": func(l *enclave.LayerCache) { l.Storage = math.MaxUint32 },
		"a page above 1 GiB": func(l *enclave.LayerCache) {
			*l = enclave.LayerCache{QueryHeads: 1024, KVHeads: 1024, DimK: 1024, DimV: 1024, Cells: 1, Streams: 1, Storage: enclave.StorageF32}
		},
		"negative everything": func(l *enclave.LayerCache) {
			*l = enclave.LayerCache{Layer: -1, QueryHeads: -1, KVHeads: -1, DimK: -1, DimV: -1, Cells: -1, Streams: -1}
		},
	}
	r := keeper(t, Options{})
	s := r.OpenStore(noModels)
	for name, change := range changes {
		bad := demo
		change(&bad)
		if _, err := s.Declare([]enclave.LayerCache{demo, bad}); !errors.Is(err, enclave.ErrCache) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, n := range []int{0, 1025} {
		if _, err := s.Declare(make([]enclave.LayerCache, n)); !errors.Is(err, enclave.ErrCache) {
			t.Errorf("%d layers: %v", n, err)
		}
	}
	if reserved, _, _, _ := r.Usage(); reserved != 0 {
		t.Errorf("%d bytes are reserved for what was refused", reserved)
	}
}

func TestLimit(t *testing.T) {
	one, err := newLayer(demo, nil)
	if err != nil {
		t.Fatal(err)
	}
	r := keeper(t, Options{Limit: 5*one.bytes - 1})
	a, b := r.OpenStore(noModels), r.OpenStore(noModels)
	first, err := a.Declare([]enclave.LayerCache{demo, demo})
	if err != nil {
		t.Fatal(err)
	}
	if want := (enclave.Reservation{First: first.First, Need: 2 * one.bytes, Limit: 5*one.bytes - 1}); first != want || first.First == 0 {
		t.Errorf("reservation %+v, want %+v", first, want)
	}
	var full *enclave.MemoryError
	if _, err := b.Declare([]enclave.LayerCache{demo, demo, demo}); !errors.As(err, &full) {
		t.Fatalf("error %v, want a MemoryError", err)
	}
	if want := (enclave.Reservation{Need: 3 * one.bytes, Reserved: 2 * one.bytes, Limit: 5*one.bytes - 1}); full.Reservation != want {
		t.Errorf("error with %+v, want %+v", full.Reservation, want)
	}
	second, err := b.Declare([]enclave.LayerCache{demo, demo})
	if err != nil || second.First != first.First+2 {
		t.Fatalf("what fits was refused: %+v, %v", second, err)
	}
	if err := a.Release(first.First); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Declare([]enclave.LayerCache{demo}); err != nil {
		t.Errorf("what was released is not there: %v", err)
	}
	b.Close()
	if _, err := a.Declare([]enclave.LayerCache{demo, demo, demo}); err != nil {
		t.Errorf("what a closed store had is not there: %v", err)
	}
}

// Together these are more bytes than an int64 counts.
func TestHugeDeclarationsAreRefused(t *testing.T) {
	big := enclave.LayerCache{QueryHeads: 256, KVHeads: 256, DimK: 1024, DimV: 1024, Cells: 1 << 26, Streams: 256, Storage: enclave.StorageF32}
	layers := make([]enclave.LayerCache, 1024)
	for i := range layers {
		layers[i] = big
	}
	var full *enclave.MemoryError
	if _, err := keeper(t, Options{}).OpenStore(noModels).Declare(layers); !errors.As(err, &full) || full.Need < 1<<61 {
		t.Errorf("error %v, want a MemoryError", err)
	}
}

func TestDefaults(t *testing.T) {
	r, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, _, limit, _ := r.Usage(); limit < 1<<20 {
		t.Errorf("the default limit is %d bytes", limit)
	}
	if r.Threads() < 1 || r.Level() == "" {
		t.Errorf("%d threads, level %q", r.Threads(), r.Level())
	}
	for _, o := range []Options{{Limit: -1}, {Threads: -1}} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}

func goodBatch() *enclave.Batch {
	return &enclave.Batch{Tokens: 4, Blocks: 2, Cells: []int64{0, 1, 300, 301}, Mask: enclave.MaskF16, MaskCells: 8, MaskRows: 3,
		MaskData: make([]byte, 2*3*8*2)}
}

func TestBeginRejects(t *testing.T) {
	huge := math.MaxInt
	changes := map[string]func(b *enclave.Batch){
		"no tokens":             func(b *enclave.Batch) { b.Tokens, b.Cells = 0, nil },
		"negative tokens":       func(b *enclave.Batch) { b.Tokens = -4 },
		"huge tokens":           func(b *enclave.Batch) { b.Tokens = huge },
		"too many tokens":       func(b *enclave.Batch) { b.Tokens = 1<<24 + 2 },
		"fewer cells":           func(b *enclave.Batch) { b.Cells = b.Cells[:3] },
		"no blocks":             func(b *enclave.Batch) { b.Blocks = 0 },
		"negative blocks":       func(b *enclave.Batch) { b.Blocks = -2 },
		"no whole blocks":       func(b *enclave.Batch) { b.Blocks = 3 },
		"negative cell":         func(b *enclave.Batch) { b.Cells[2] = -1 },
		"least cell":            func(b *enclave.Batch) { b.Cells[2] = math.MinInt64 },
		"unknown mask":          func(b *enclave.Batch) { b.Mask = 3 },
		"greatest mask":         func(b *enclave.Batch) { b.Mask = math.MaxUint32 },
		"short mask":            func(b *enclave.Batch) { b.MaskData = b.MaskData[1:] },
		"long mask":             func(b *enclave.Batch) { b.MaskData = append(b.MaskData, 0) },
		"too few rows":          func(b *enclave.Batch) { b.MaskRows = 1 },
		"negative rows":         func(b *enclave.Batch) { b.MaskRows = -3 },
		"huge rows":             func(b *enclave.Batch) { b.MaskRows = huge },
		"negative mask cells":   func(b *enclave.Batch) { b.MaskCells = -8 },
		"huge mask cells":       func(b *enclave.Batch) { b.MaskCells = huge },
		"mask of 2^50 bytes":    func(b *enclave.Batch) { b.MaskCells, b.MaskRows = 1<<26, 1<<24 },
		"size that overflows":   func(b *enclave.Batch) { b.MaskCells, b.MaskRows, b.MaskData = 1<<33, 1<<30, nil },
		"no mask, but its data": func(b *enclave.Batch) { b.Mask = enclave.MaskNone },
	}
	s := newScene(t, demo, 41)
	for name, change := range changes {
		if err := s.store.Begin(3, goodBatch()); err != nil {
			t.Fatal(err)
		}
		b := goodBatch()
		change(b)
		if err := s.store.Begin(3, b); !errors.Is(err, enclave.ErrCache) {
			t.Errorf("%s: %v", name, err)
		}
		if err := s.store.Attend(s.id, &enclave.Attention{Slot: 3}); !errors.Is(err, enclave.ErrCache) {
			t.Errorf("%s: the batch before it is still there: %v", name, err)
		}
	}
	for _, slot := range []int{-1, enclave.Batches, math.MaxInt, math.MinInt} {
		if err := s.store.Begin(slot, goodBatch()); !errors.Is(err, enclave.ErrCache) {
			t.Errorf("slot %d: %v", slot, err)
		}
	}
	if err := s.store.Begin(0, nil); !errors.Is(err, enclave.ErrCache) {
		t.Errorf("nil: %v", err)
	}
}

// The engine may change a batch after Begin; the enclave's copy is what counts.
func TestBatchIsCopied(t *testing.T) {
	s := newScene(t, demo, 42)
	s.play(s.fill(5, enclave.MaskF16, 0), 0, 1, 1)
	u := s.decode([]int64{0}, 4, enclave.MaskF16, 0)
	b := s.batch(u)
	if err := s.store.Begin(0, b); err != nil {
		t.Fatal(err)
	}
	clear(b.MaskData) // would show every cell
	b.Cells[0] = 899
	a := enclave.Attention{QueryCount: 1, Scale: 1, Q: make([]float32, 240), Out: make([]float32, 144)}
	if err := s.store.Attend(s.id, &a); err != nil {
		t.Error(err)
	}
}

func TestAttendRejects(t *testing.T) {
	huge := math.MaxInt
	changes := map[string]func(a *enclave.Attention){
		"negative slot":       func(a *enclave.Attention) { a.Slot = -1 },
		"slot past the end":   func(a *enclave.Attention) { a.Slot = 8 },
		"empty slot":          func(a *enclave.Attention) { a.Slot = 1 },
		"negative put":        func(a *enclave.Attention) { a.PutFirst = -1 },
		"negative puts":       func(a *enclave.Attention) { a.PutCount = -1 },
		"huge put":            func(a *enclave.Attention) { a.PutFirst = huge },
		"huge puts":           func(a *enclave.Attention) { a.PutCount = huge },
		"both huge":           func(a *enclave.Attention) { a.PutFirst, a.PutCount = huge, huge },
		"puts past the end":   func(a *enclave.Attention) { a.PutFirst = 3 },
		"negative query":      func(a *enclave.Attention) { a.QueryFirst = math.MinInt },
		"huge queries":        func(a *enclave.Attention) { a.QueryCount = huge },
		"queries past it":     func(a *enclave.Attention) { a.QueryFirst = 4 },
		"short keys":          func(a *enclave.Attention) { a.K = a.K[1:] },
		"long values":         func(a *enclave.Attention) { a.V = append(a.V, 0) },
		"no queries":          func(a *enclave.Attention) { a.Q = nil },
		"short results":       func(a *enclave.Attention) { a.Out = a.Out[1:] },
		"results in queries":  func(a *enclave.Attention) { a.Out = a.Q[:144] },
		"one sink":            func(a *enclave.Attention) { a.Sinks = make([]float32, 1) },
		"NaN sink":            func(a *enclave.Attention) { a.Sinks = []float32{0, 0, 0, 0, 0, float32(math.NaN())} },
		"NaN scale":           func(a *enclave.Attention) { a.Scale = float32(math.NaN()) },
		"infinite bias":       func(a *enclave.Attention) { a.MaxBias = float32(math.Inf(1)) },
		"tiny softcap":        func(a *enclave.Attention) { a.LogitSoftcap, a.Scale = 1e-40, 1e20 },
		"infinite key":        func(a *enclave.Attention) { a.K[3] = float32(math.Inf(1)) },
		"value no half holds": func(a *enclave.Attention) { a.V[3] = 70000 },
		"NaN query":           func(a *enclave.Attention) { a.Q[3] = float32(math.NaN()) },
	}
	s := newScene(t, demo, 43)
	if err := s.store.Begin(0, goodBatch()); err != nil {
		t.Fatal(err)
	}
	good := func() *enclave.Attention {
		a := &enclave.Attention{PutCount: 2, QueryCount: 1, Scale: 1}
		a.K, a.V, a.Q, a.Out = make([]float32, 160), make([]float32, 96), make([]float32, 240), make([]float32, 144)
		return a
	}
	for name, change := range changes {
		a := good()
		change(a)
		if err := s.store.Attend(s.id, a); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := s.store.Attend(s.id, nil); !errors.Is(err, enclave.ErrCache) {
		t.Errorf("nil: %v", err)
	}
	for _, id := range []enclave.CacheID{0, s.id + 1, math.MaxUint32} {
		if err := s.store.Attend(id, good()); !errors.Is(err, enclave.ErrCache) {
			t.Errorf("layer %d: %v", id, err)
		}
	}
}

// Which stream a token belongs to is known only with the layer.
func TestBlocksMustFitTheLayer(t *testing.T) {
	s := newScene(t, demo, 44)
	for name, cells := range map[string][]int64{
		"past the layer":         {0, 1, 900, 901},
		"greatest cell":          {0, 1, 300, math.MaxInt64},
		"a block in two streams": {0, 300, 301, 302},
	} {
		b := goodBatch()
		b.Cells = cells
		if err := s.store.Begin(0, b); err != nil {
			t.Fatal(err)
		}
		if err := s.store.Attend(s.id, &enclave.Attention{}); !errors.Is(err, enclave.ErrCache) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The same batch fits one layer and not another: what was found for the first is not taken for the second.
	two := demo
	two.Streams = 2
	other := declare(t, s.store, two)
	b := goodBatch()
	b.Cells = []int64{0, 1, 600, 601}
	if err := s.store.Begin(0, b); err != nil {
		t.Fatal(err)
	}
	for _, id := range []enclave.CacheID{s.id, other, s.id} {
		if err := s.store.Attend(id, &enclave.Attention{}); errors.Is(err, enclave.ErrCache) != (id == other) {
			t.Errorf("layer %d: %v", id, err)
		}
	}
}

func TestKeepAndCopyReject(t *testing.T) {
	s := newScene(t, demo, 45)
	for _, tt := range []struct{ first, n, words int }{
		{-1, 1, 1}, {0, -1, 0}, {900, 1, 1}, {math.MaxInt, 1, 1}, {1, math.MaxInt, 1}, {0, 901, 29}, {0, 32, 2}, {0, 33, 1}, {math.MinInt, 64, 2},
	} {
		if err := s.store.Keep(s.id, tt.first, tt.n, make([]uint32, tt.words)); !errors.Is(err, enclave.ErrCache) {
			t.Errorf("%+v: %v", tt, err)
		}
	}
	for _, tt := range [][2]int{{-1, 0}, {0, -1}, {3, 0}, {0, 3}, {math.MaxInt, math.MinInt}} {
		if err := s.store.Copy(s.id, tt[0], tt[1]); !errors.Is(err, enclave.ErrCache) {
			t.Errorf("copy %v: %v", tt, err)
		}
	}
	if err := s.store.Keep(s.id, 900, 0, nil); err != nil {
		t.Errorf("no cells: %v", err)
	}
}
