package resident

import (
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/kvshield/kvshield/enclave"
)

// peek asks for attention over one cell of a stream: whoever may see it learns its value.
func (s *scene) peek(stream, cell int64) ([]float32, error) {
	s.t.Helper()
	h := s.layer
	u := &turn{blocks: 1, mask: enclave.MaskF16, wide: h.Cells, cells: []int64{stream*int64(h.Cells) + cell}, bias: []map[int64]float32{{cell: 0}}}
	if err := s.store.Begin(7, s.batch(u)); err != nil {
		return nil, err
	}
	a := enclave.Attention{Slot: 7, QueryCount: 1, Scale: 1}
	a.Q, a.Out = make([]float32, h.QueryHeads*h.DimK), make([]float32, h.QueryHeads*h.DimV)
	err := s.store.Attend(s.id, &a)
	return a.Out, err
}

// sees says whether each cell of stream 0 and of stream 1 can be seen, and checks what is seen.
func (s *scene) sees(cells int64) (seen [2][]int64) {
	s.t.Helper()
	for stream := range int64(2) {
		for cell := range cells {
			out, err := s.peek(stream, cell)
			if errors.Is(err, enclave.ErrCache) {
				if slices.ContainsFunc(out, func(x float32) bool { return x != 0 }) {
					s.t.Fatalf("cell %d of stream %d: an error and a result", cell, stream)
				}
				continue
			}
			if err != nil {
				s.t.Fatal(err)
			}
			seen[stream] = append(seen[stream], cell)
		}
	}
	return seen
}

func upTo(n int64) (list []int64) {
	for i := range n {
		list = append(list, i)
	}
	return list
}

func TestWipedCellsCannotBeSeen(t *testing.T) {
	all := upTo(10)
	tests := []struct {
		name string
		do   func(s *scene) error
		want [2][]int64
	}{
		{"nothing", func(s *scene) error { return nil }, [2][]int64{all, all}},
		{"clear", func(s *scene) error { return s.store.Clear(s.id) }, [2][]int64{}},
		{"keep some", func(s *scene) error { return s.store.Keep(s.id, 2, 6, []uint32{0b001001}) }, [2][]int64{{0, 1, 2, 5, 8, 9}, all}},
		{"keep over streams", func(s *scene) error {
			keep := make([]uint32, 10) // of the cells from 5 on to 3 of the next stream
			keep[0], keep[9] = 0b00010, 1<<(296-288)
			return s.store.Keep(s.id, 5, 299, keep)
		}, [2][]int64{{0, 1, 2, 3, 4, 6}, {1, 4, 5, 6, 7, 8, 9}}},
		{"keep nothing", func(s *scene) error { return s.store.Keep(s.id, 0, 900, make([]uint32, 29)) }, [2][]int64{}},
		{"copy an empty stream", func(s *scene) error { return s.store.Copy(s.id, 2, 0) }, [2][]int64{nil, all}},
	}
	for _, storage := range []enclave.Storage{enclave.StorageF16, enclave.StorageQ8_0} {
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				layer := demo
				layer.Storage = storage
				s := newScene(t, layer, 31)
				s.play(s.fill(10, enclave.MaskF16, 0), 0, 1, 1)
				if err := s.store.Keep(s.id, 600, 300, make([]uint32, 10)); err != nil { // stream 2 is empty
					t.Fatal(err)
				}
				if err := tt.do(s); err != nil {
					t.Fatal(err)
				}
				if seen := s.sees(10); !slices.Equal(seen[0], tt.want[0]) || !slices.Equal(seen[1], tt.want[1]) {
					t.Errorf("cells %v can be seen, want %v", seen, tt.want)
				}
			})
		}
	}
}

func TestWindow(t *testing.T) {
	words := []uint32{0x89abcdef, 0x01234567, 0xfedcba98}
	bit := func(w []uint32, i int64) uint32 { return w[i/32] >> (i % 32) & 1 }
	for at := range int64(96) {
		for n := range 96 - at + 1 {
			w := window(words, at, n)
			for i := range n {
				if bit(w, i) != bit(words, at+i) {
					t.Fatalf("window at %d of %d: bit %d is wrong", at, n, i)
				}
			}
		}
	}
}

func TestCopiedStream(t *testing.T) {
	s := newScene(t, demo, 32)
	s.play(s.fill(10, enclave.MaskF16, 0), 0, 1, 1)
	if err := s.store.Keep(s.id, 300, 300, []uint32{0b1111, 0, 0, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	if err := s.store.Copy(s.id, 1, 0); err != nil {
		t.Fatal(err)
	}
	if seen := s.sees(10); !slices.Equal(seen[0], upTo(4)) {
		t.Errorf("cells %v can be seen in the copy", seen[0])
	}
	for cell := range int64(4) {
		k, v := s.read(cell)
		if !slices.Equal(k, s.k[300+cell]) || !slices.Equal(v, s.v[300+cell]) {
			t.Errorf("cell %d of the copy differs", cell)
		}
	}
	// The copy is one: what is written to it does not reach the other stream.
	s.k[0], s.v[0] = exact(s.rnd, 2, 40), exact(s.rnd, 2, 24)
	u := s.decode([]int64{0}, 0, enclave.MaskF16, 0)
	s.play(u, 0, 1, 1)
	if k, _ := s.read(300); !slices.Equal(k, s.k[300]) {
		t.Error("the other stream changed")
	}
}

func TestReleaseGivesBack(t *testing.T) {
	s := newScene(t, demo, 33)
	r := s.store.(*store).r
	s.play(s.fill(10, enclave.MaskF16, 0), 0, 1, 1)
	reserved, used, limit, kinds := r.Usage()
	var sum int64
	for _, n := range kinds {
		sum += n
	}
	if reserved <= 0 || used <= 0 || used > reserved || limit != 1<<28 || sum != used {
		t.Errorf("reserved %d, used %d, limit %d, kinds %v", reserved, used, limit, kinds)
	}
	left := s.store.(*store).layers[s.id].streams
	if err := s.store.Release(s.id); err != nil {
		t.Fatal(err)
	}
	for i, c := range left {
		if c.Bytes() != 0 {
			t.Errorf("stream %d of a released layer has %d bytes", i, c.Bytes())
		}
	}
	if reserved, used, _, kinds := r.Usage(); reserved != 0 || used != 0 || len(kinds) != 0 {
		t.Errorf("after Release: reserved %d, used %d, kinds %v", reserved, used, kinds)
	}
	if _, err := s.peek(0, 0); !errors.Is(err, enclave.ErrCache) {
		t.Errorf("a released layer answers: %v", err)
	}
	again := declare(t, s.store, s.layer)
	if again == s.id {
		t.Error("a number was used again")
	}
	s.id = again
	if seen := s.sees(10); seen[0] != nil || seen[1] != nil {
		t.Errorf("a fresh layer shows cells %v", seen)
	}
}

func TestStoresDoNotSeeEachOther(t *testing.T) {
	s := newScene(t, demo, 34)
	s.play(s.fill(10, enclave.MaskF16, 0), 0, 1, 1)
	other := &scene{t: t, store: s.store.(*store).r.OpenStore(noModels), id: s.id, layer: s.layer}
	if _, err := other.peek(0, 0); !errors.Is(err, enclave.ErrCache) {
		t.Errorf("another store's layer answers: %v", err)
	}
	r := plainRope
	r.Shift = []int32{1}
	for name, err := range map[string]error{
		"release": other.store.Release(s.id), "clear": other.store.Clear(s.id), "copy": other.store.Copy(s.id, 0, 1),
		"keep": other.store.Keep(s.id, 0, 1, []uint32{0}), "rotate": other.store.Rotate(s.id, &r),
	} {
		if !errors.Is(err, enclave.ErrCache) {
			t.Errorf("%s of another store's layer: %v", name, err)
		}
	}
	own := declare(t, other.store, s.layer)
	if own == s.id {
		t.Fatal("two stores have the same number")
	}
	other.store.Close()
	if seen := s.sees(10); !slices.Equal(seen[0], upTo(10)) {
		t.Errorf("closing another store left cells %v", seen[0])
	}
	if reserved, _, _, _ := s.store.(*store).r.Usage(); reserved != s.store.(*store).layers[s.id].bytes {
		t.Errorf("%d bytes are reserved", reserved)
	}
}

func TestCloseWaitsAndEnds(t *testing.T) {
	s := newScene(t, demo, 35)
	r := s.store.(*store).r
	s.play(s.fill(30, enclave.MaskF16, 0), 0, 1, 1)
	var both sync.WaitGroup
	for range 4 {
		both.Go(func() {
			for {
				if _, err := s.peek(0, 3); err != nil {
					return
				}
			}
		})
	}
	other := r.OpenStore(noModels)
	both.Go(func() {
		for range 20 {
			made, err := other.Declare([]enclave.LayerCache{demo})
			if err != nil {
				return
			}
			r.Usage()
			if err := other.Release(made.First); err != nil {
				return
			}
		}
	})
	s.store.Close()
	r.Close()
	both.Wait()
	s.store.Close()
	if reserved, used, _, _ := r.Usage(); reserved != 0 || used != 0 {
		t.Errorf("after Close: reserved %d, used %d", reserved, used)
	}
	late := r.OpenStore(modelsOf(1))
	if _, err := late.Declare([]enclave.LayerCache{demo}); err == nil {
		t.Error("a layer was declared after Close")
	}
	if err := late.Begin(0, &enclave.Batch{}); err == nil {
		t.Error("a batch began after Close")
	}
	if _, err := late.Opener(make([]byte, enclave.SealHeader)); err == nil {
		t.Error("a state was opened after Close")
	}
	late.Close()
	r.Close()
}
