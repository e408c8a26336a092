package vault

import (
	"errors"
	"sync"
	"testing"

	"github.com/kvshield/kvshield/enclave"
)

func TestInvertRejects(t *testing.T) {
	v := New(Options{})
	res, _ := load(t, v, standard.build(t, 1))
	n := res.RowFloats
	rows := make([]float32, 4*n)
	tests := []struct {
		name     string
		id       enclave.ModelID
		layer    int
		dst, src []float32
		want     error
	}{
		{"no such model", res.ID + 1, 0, rows[:n], rows[n : 2*n], enclave.ErrUnknownModel},
		{"model zero", 0, 0, rows[:n], rows[n : 2*n], enclave.ErrUnknownModel},
		{"negative layer", res.ID, -1, rows[:n], rows[n : 2*n], ErrRows},
		{"layer too high", res.ID, res.Layers, rows[:n], rows[n : 2*n], ErrRows},
		{"part of a row", res.ID, 0, rows[:n-1], rows[n : 2*n-1], ErrRows},
		{"short destination", res.ID, 0, rows[:n], rows[n : 3*n], ErrRows},
		{"long destination", res.ID, 0, rows[:2*n], rows[2*n : 3*n], ErrRows},
		{"in place", res.ID, 0, rows[:n], rows[:n], ErrRows},
		{"overlapping", res.ID, 0, rows[:2*n], rows[n : 3*n], ErrRows},
		{"no rows", res.ID, 0, nil, nil, nil},
		{"three rows", res.ID, 1, make([]float32, 3*n), rows[:3*n], nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := v.Invert(tt.id, tt.layer, tt.dst, tt.src); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
}

// Every row is permuted alike, and every float of it is used once.
func TestInvertRows(t *testing.T) {
	v := New(Options{})
	res, _ := load(t, v, standard.build(t, 1))
	n := res.RowFloats
	src, dst := make([]float32, 3*n), make([]float32, 3*n)
	for i := range src {
		src[i] = float32(i)
	}
	if err := v.Invert(res.ID, 1, dst, src); err != nil {
		t.Fatal(err)
	}
	seen := map[float32]bool{}
	for i, x := range dst {
		if seen[x] || x != dst[i%n]+float32(i/n*n) {
			t.Fatalf("float %d is %g", i, x)
		}
		seen[x] = true
	}
}

func TestUnload(t *testing.T) {
	v := New(Options{})
	res, _ := load(t, v, standard.build(t, 1))
	m := (*v.models.Load())[res.ID]
	if err := v.Unload(t.Context(), res.ID); err != nil {
		t.Fatal(err)
	}
	if err := v.Unload(t.Context(), res.ID); !errors.Is(err, enclave.ErrUnknownModel) {
		t.Errorf("second Unload: %v", err)
	}
	row := make([]float32, 2*res.RowFloats)
	if err := v.Invert(res.ID, 0, row[:res.RowFloats], row[res.RowFloats:]); !errors.Is(err, enclave.ErrUnknownModel) {
		t.Errorf("Invert after Unload: %v", err)
	}
	defer func() {
		if recover() == nil {
			t.Error("the tables of an unloaded model are still mapped")
		}
	}()
	m.mem.Bytes()
}

// Inverts that run while a model is unloaded end well or say that it is gone; those of another
// model are not disturbed. The race detector and the unmapped tables see to the rest.
func TestUnloadWaitsForInverts(t *testing.T) {
	v, from := New(Options{}), standard.build(t, 1)
	stays, _ := load(t, v, from)
	for range 20 {
		goes, _ := load(t, v, from)
		var all sync.WaitGroup
		for _, id := range []enclave.ModelID{stays.ID, goes.ID, goes.ID} {
			started := make(chan struct{})
			all.Go(func() {
				src, dst := make([]float32, 8*stays.RowFloats), make([]float32, 8*stays.RowFloats)
				close(started)
				for range 200 {
					err := v.Invert(id, 1, dst, src)
					if err != nil && (id == stays.ID || !errors.Is(err, enclave.ErrUnknownModel)) {
						t.Errorf("model %d: %v", id, err)
					}
				}
			})
			<-started
		}
		if err := v.Unload(t.Context(), goes.ID); err != nil {
			t.Error(err)
		}
		all.Wait()
	}
}

func TestInvertAllocatesNothing(t *testing.T) {
	v := New(Options{})
	res, _ := load(t, v, standard.build(t, 1))
	src, dst := make([]float32, res.RowFloats), make([]float32, res.RowFloats)
	if n := testing.AllocsPerRun(100, func() { _ = v.Invert(res.ID, 0, dst, src) }); n != 0 {
		t.Errorf("%g allocations for each Invert", n)
	}
}

func BenchmarkInvert(b *testing.B) {
	v := New(Options{})
	s := with(func(s *sample) { s.layers, s.heads, s.kv, s.dim, s.values, s.rot = 1, 32, 8, 64, 64, 64 })
	res, _ := load(b, v, s.build(b, 1))
	src, dst := make([]float32, res.RowFloats), make([]float32, res.RowFloats)
	b.SetBytes(int64(4 * len(src)))
	for b.Loop() {
		if err := v.Invert(res.ID, 0, dst, src); err != nil {
			b.Fatal(err)
		}
	}
}
