package resident

import (
	"errors"
	"fmt"
	"testing"

	"github.com/kvshield/kvshield/enclave"
)

// fill returns a turn that writes the first n cells of each stream, each token seeing some of those up to its own.
func (s *scene) fill(n int, mask enclave.MaskType, bias ...float32) *turn {
	u := &turn{blocks: s.layer.Streams, mask: mask, wide: n + 13}
	for stream := range s.layer.Streams {
		for i := range n {
			u.cells = append(u.cells, int64(stream*s.layer.Cells+i))
			seen := map[int64]float32{int64(i): 0}
			for c := range i {
				if s.rnd.IntN(3) > 0 {
					seen[int64(c)] = bias[s.rnd.IntN(len(bias))]
				}
			}
			u.bias = append(u.bias, seen)
		}
	}
	return u
}

func TestAttentionOverSeveralStreams(t *testing.T) {
	sinks := []float32{0.5, -1, 2, 0, 1, -3}
	tests := []struct {
		name   string
		params enclave.Attention
		mask   enclave.MaskType
		bias   []float32
	}{
		{"plain", enclave.Attention{Scale: 0.15}, enclave.MaskF16, []float32{0}},
		{"mask of f32", enclave.Attention{Scale: 0.15}, enclave.MaskF32, []float32{0, -0.37, 1.25}},
		{"sinks", enclave.Attention{Scale: 0.15, Sinks: sinks}, enclave.MaskF16, []float32{0}},
		{"softcap", enclave.Attention{Scale: 1, LogitSoftcap: 5}, enclave.MaskF16, []float32{0}},
		{"alibi", enclave.Attention{Scale: 0.15, MaxBias: 8}, enclave.MaskF16, []float32{0, -1, -2, -4}},
	}
	for _, storage := range []enclave.Storage{enclave.StorageF16, enclave.StorageF32, enclave.StorageQ8_0} {
		for i, tt := range tests {
			t.Run(fmt.Sprintf("%s/storage %d", tt.name, storage), func(t *testing.T) {
				layer := demo
				layer.Storage = storage
				s := newScene(t, layer, uint64(i))
				s.params = tt.params
				s.play(s.fill(40, tt.mask, tt.bias...), 0, 2, 3)
				s.play(s.decode([]int64{2, 0, 1}, 40, tt.mask, tt.bias...), 5, 1, 1)
				s.play(s.decode([]int64{1}, 41, tt.mask, tt.bias...), 5, 1, 1)
			})
		}
	}
}

// decode returns a turn with one token for each of some streams, which sees every other cell.
func (s *scene) decode(streams []int64, at int64, mask enclave.MaskType, bias ...float32) *turn {
	u := &turn{blocks: len(streams), mask: mask, wide: s.layer.Cells}
	for _, stream := range streams {
		u.cells = append(u.cells, stream*int64(s.layer.Cells)+at)
		seen := map[int64]float32{at: 0}
		for c := at % 2; c < at; c += 2 {
			seen[c] = bias[s.rnd.IntN(len(bias))]
		}
		u.bias = append(u.bias, seen)
	}
	return u
}

// Two sequences in one stream, their cells in turns and in no order, and cells that are used again.
func TestInterleavedSequencesAndReuse(t *testing.T) {
	layer := demo
	layer.Streams, layer.Cells = 1, 600
	s := newScene(t, layer, 3)
	for round := range 3 {
		order := s.rnd.Perm(layer.Cells)
		u := &turn{blocks: 1, mask: enclave.MaskF16, wide: layer.Cells}
		seen := [2]map[int64]float32{{}, {}}
		for i := range 30 {
			cell := int64(order[i])
			seen[i%2][cell] = 0
			sees := map[int64]float32{}
			for c := range seen[i%2] {
				sees[c] = 0
			}
			u.cells, u.bias = append(u.cells, cell), append(u.bias, sees)
		}
		s.play(u, round, 2, 3)
	}
}

func TestWithoutMask(t *testing.T) {
	layer := demo
	layer.Streams = 2
	s := newScene(t, layer, 4)
	u := s.fill(35, enclave.MaskNone, 0)
	u.wide = 33
	s.play(u, 1, 2, 3)
}

// A layer that shares another one's keys and values asks only; one without queries stores only.
func TestPutAndQueryAlone(t *testing.T) {
	s := newScene(t, demo, 6)
	s.play(s.fill(9, enclave.MaskF16, 0), 0, 27, 27)
	a := s.params
	if err := s.store.Attend(s.id, &a); err != nil {
		t.Errorf("nothing to do: %v", err)
	}
}

func TestStorageOverride(t *testing.T) {
	f32 := enclave.StorageF32
	var need []int64
	for _, o := range []Options{{}, {Storage: &f32}} {
		made, err := keeper(t, o).OpenStore(noModels).Declare([]enclave.LayerCache{demo})
		if err != nil {
			t.Fatal(err)
		}
		need = append(need, made.Need)
	}
	if need[1] <= need[0] {
		t.Errorf("F32 reserves %d bytes, F16 %d", need[1], need[0])
	}
	other := enclave.StorageQ8_0 + 1
	if _, err := New(Options{Storage: &other}); err == nil {
		t.Error("an unknown storage was accepted")
	}
}

func TestAttendFailsWithZeros(t *testing.T) {
	s := newScene(t, demo, 7)
	s.play(s.fill(5, enclave.MaskF16, 0), 0, 1, 1)
	if err := s.store.Keep(s.id, 302, 1, []uint32{0}); err != nil {
		t.Fatal(err)
	}
	u := s.decode([]int64{0, 1}, 4, enclave.MaskF16, 0) // only the second one sees a cell that is gone
	if err := s.store.Begin(0, s.batch(u)); err != nil {
		t.Fatal(err)
	}
	a := s.params
	a.QueryCount = 2
	a.Q, a.Out = make([]float32, 2*demo.QueryHeads*demo.DimK), make([]float32, 2*demo.QueryHeads*demo.DimV)
	for i := range a.Out {
		a.Out[i] = 7
	}
	if err := s.store.Attend(s.id, &a); !errors.Is(err, enclave.ErrCache) {
		t.Errorf("error %v, want ErrCache", err)
	}
	for i, x := range a.Out {
		if x != 0 {
			t.Fatalf("result %d is %v after an error", i, x)
		}
	}
}
