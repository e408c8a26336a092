package slotfile

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/kvshield/kvshield/audit"
)

func TestRealFiles(t *testing.T) {
	reference, tokens := saved(t, "-fa", "on", "-ctk", "f32", "-ctv", "f32")
	want, err := Parse(reference, demo)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		k, v, fa string
		within   float64
		name     string
	}{
		{"f32", "f32", "on", 0, "F32"}, {"f32", "f32", "off", 2e-3, "F32"}, {"f16", "f16", "on", 1e-3, "F16"}, {"f16", "f16", "off", 2e-3, "F16"},
		{"f32", "f16", "off", 2e-3, "F32 keys, F16 values"}, {"bf16", "bf16", "on", 8e-3, "BF16"}, {"q8_0", "q8_0", "on", 2e-2, "Q8_0"},
		{"q8_0", "f16", "off", 2e-2, "Q8_0 keys, F16 values"}, {"f16", "q8_0", "on", 2e-2, "F16 keys, Q8_0 values"},
	} {
		t.Run(fmt.Sprintf("%s %s fa %s", c.k, c.v, c.fa), func(t *testing.T) {
			b, _ := saved(t, "-fa", c.fa, "-ctk", c.k, "-ctv", c.v)
			f, err := Parse(b, demo)
			if err != nil {
				t.Fatal(err)
			}
			if len(f.Tokens) < len(tokens) || !slices.Equal(f.Tokens[:len(tokens)], tokens) {
				t.Errorf("tokens %v, said %v", f.Tokens, tokens)
			}
			if f.Snapshot.Type != c.name {
				t.Errorf("type %q, want %q", f.Snapshot.Type, c.name)
			}
			near(t, want.Snapshot, f.Snapshot, c.within)
			for i, p := range f.Snapshot.Positions {
				if int(p) != i {
					t.Fatalf("row %d has position %d", i, p)
				}
			}
		})
	}
}

func away(a, b []float32) float64 {
	if len(a) != len(b) {
		return math.Inf(1)
	}
	var d, size float64
	for i := range a {
		d += float64(a[i]-b[i]) * float64(a[i]-b[i])
		size += float64(a[i]) * float64(a[i])
	}
	return math.Sqrt(d / size)
}

// near fails when two snapshots are further apart than within, relatively, in any layer.
func near(t *testing.T, want, got *audit.Snapshot, within float64) {
	t.Helper()
	if len(want.Layers) != len(got.Layers) {
		t.Fatalf("%d layers, want %d", len(got.Layers), len(want.Layers))
	}
	for l := range want.Layers {
		a, b := want.Layers[l], got.Layers[l]
		if d := away(a.K.Data, b.K.Data); !(d <= within) {
			t.Errorf("layer %d: keys are %.4f away", l, d)
		}
		if d := away(a.V.Data, b.V.Data); !(d <= within) {
			t.Errorf("layer %d: values are %.4f away", l, d)
		}
	}
}

// Engines rotate quantised caches of heads of 64 and more: the demo model, told to have one head of 64, does.
func TestRotatedCache(t *testing.T) {
	wide := Shape{Layers: 5, HeadsKV: 1}
	as := []string{"-fa", "on", "--override-kv", "llama.attention.head_count=int:2,llama.attention.head_count_kv=int:1,llama.rope.dimension_count=int:64"}
	parse := func(args ...string) *File {
		b, _ := saved(t, append(as, args...)...)
		f, err := Parse(b, wide)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	want, got := parse("-ctk", "f32", "-ctv", "f32"), parse("-ctk", "q8_0", "-ctv", "q8_0")
	if want.RotatedK != 0 || want.RotatedV != 0 || got.RotatedK != 64 || got.RotatedV != 64 {
		t.Errorf("rotations of %d and %d in F32, of %d and %d in Q8_0", want.RotatedK, want.RotatedV, got.RotatedK, got.RotatedV)
	}
	near(t, want.Snapshot, got.Snapshot, 2e-2)
}

// A server of several slots keeps a stream for each, unless told to keep them in one.
func TestSeveralSlots(t *testing.T) {
	reference, tokens := saved(t)
	want, err := Parse(reference, demo)
	if err != nil {
		t.Fatal(err)
	}
	for _, flag := range []string{"--no-kv-unified", "--kv-unified"} {
		t.Run(flag, func(t *testing.T) {
			e := start(t, "-np", "3", flag)
			e.ask(t, 0, tokens[:3], 0)
			e.ask(t, 1, tokens, 0)
			f, err := Read(e.save(t, 1), demo)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(f.Tokens, want.Tokens) {
				t.Errorf("tokens %v, want %v", f.Tokens, want.Tokens)
			}
			near(t, want.Snapshot, f.Snapshot, 1e-3)
		})
	}
}

// After a context shift the cells are no longer in the order of their positions.
func TestContextShift(t *testing.T) {
	for _, fa := range []string{"on", "off"} {
		t.Run("fa "+fa, func(t *testing.T) {
			e := start(t, "-np", "1", "-c", "256", "--context-shift", "-fa", fa, "-ctk", "f32", "-ctv", "f32")
			e.ask(t, 0, e.tokenize(t, text), 300)
			f, err := Read(e.save(t, 0), demo)
			if err != nil {
				t.Fatal(err)
			}
			checkShifted(t, f)
		})
	}
}

// checkShifted relies on the values of the first layer, which depend on the token alone.
func checkShifted(t *testing.T, f *File) {
	t.Helper()
	s := f.Snapshot
	if n := s.Tokens(); n != len(f.Tokens) || n < 130 || n > 256 {
		t.Fatalf("%d rows for %d tokens; want one of each for all that remained of 256", n, len(f.Tokens))
	}
	first, again := map[int32]int{}, 0
	for i, token := range f.Tokens {
		if s.Position(i) != i {
			t.Fatalf("row %d has position %d", i, s.Position(i))
		}
		j, seen := first[token]
		if !seen {
			first[token] = i
			continue
		}
		again++
		if d := away(s.Layers[0].V.Row(j), s.Layers[0].V.Row(i)); d > 1e-4 {
			t.Fatalf("rows %d and %d are of token %d and %.4f away", j, i, token, d)
		}
	}
	if again < 20 {
		t.Errorf("only %d tokens occur again: too few to tell", again)
	}
}

func TestEmptySlot(t *testing.T) {
	for _, slots := range []string{"1", "2"} {
		e := start(t, "-np", slots)
		if _, err := Read(e.save(t, 0), demo); !errors.Is(err, ErrEmpty) {
			t.Errorf("%s slots: %v, want %v", slots, err, ErrEmpty)
		}
	}
}
