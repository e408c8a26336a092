package shield

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/keys"
)

func draw(t *testing.T, s Shape, seed byte) *Permutation {
	t.Helper()
	root, err := keys.New(bytes.NewReader(bytes.Repeat([]byte{seed}, keys.Size)))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Destroy()
	p, err := Draw(s, root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Wipe)
	return p
}

func isPermutation(table []uint16) bool {
	sorted := slices.Sorted(slices.Values(table))
	for i, v := range sorted {
		if int(v) != i {
			return false
		}
	}
	return true
}

var shapes = []Shape{
	{Layers: 2, Heads: 4, HeadsKV: 4, KeyDim: 8, ValueDim: 8, RotDim: 8, Rope: RopeNorm, Base: 10000},
	{Layers: 3, Heads: 32, HeadsKV: 8, KeyDim: 64, ValueDim: 64, RotDim: 64, Rope: RopeNorm, Base: 500000},
	{Layers: 1, Heads: 8, HeadsKV: 1, KeyDim: 128, ValueDim: 96, RotDim: 32, Rope: RopeNeox, Base: 10000},
	{Layers: 2, Heads: 6, HeadsKV: 2, KeyDim: 16, ValueDim: 8, Rope: RopeNone},
	{Layers: 1, Heads: 1, HeadsKV: 1, KeyDim: 2, ValueDim: 1, RotDim: 2, Rope: RopeNorm, Base: 1},
	{Layers: 3, Heads: 8, HeadsKV: 4, KeyDim: 8, ValueDim: 8, RotDim: 8, Rope: RopeNeox, Base: 10000, PerLayer: []Counts{{8, 2}, {4, 4}, {6, 3}}},
}

func (s Shape) String() string {
	return fmt.Sprintf("heads=%d-%d,dim=%d-%d,rot=%d,rope=%d", s.Heads, s.HeadsKV, s.KeyDim, s.ValueDim, s.RotDim, s.Rope)
}

func TestEveryHeadIsUsedOnceAndWhole(t *testing.T) {
	for _, s := range shapes {
		t.Run(s.String(), func(t *testing.T) {
			p := draw(t, s, 1)
			for layer := range s.Layers {
				for _, r := range []Role{Query, Key, Value} {
					heads, rows := s.HeadRows(r, layer)
					var from []uint16
					for h := range heads {
						src, table := p.Head(r, layer, h)
						if from = append(from, uint16(src)); len(table) != rows || !isPermutation(table) {
							t.Fatalf("layer %d, role %d, head %d: rows %v are no permutation of %d", layer, r, h, table, rows)
						}
					}
					if !isPermutation(from) {
						t.Fatalf("layer %d, role %d: heads %v are no permutation of %d", layer, r, from, heads)
					}
				}
			}
		})
	}
}

// A query head has to meet the keys and values that it was trained with.
func TestQueryHeadsFollowTheirGroup(t *testing.T) {
	s := shapes[1]
	p, group := draw(t, s, 2), 4
	for h := range s.Heads {
		query, _ := p.Head(Query, 1, h)
		key, _ := p.Head(Key, 1, h/group)
		value, _ := p.Head(Value, 1, h/group)
		if query/group != key || key != value || query%group != h%group {
			t.Errorf("head %d: query head %d, key head %d, value head %d", h, query, key, value)
		}
	}
}

func TestRotaryPairsStayTogether(t *testing.T) {
	for _, s := range shapes {
		p := draw(t, s, 3)
		moved := 0
		for j, word := range p.pairs {
			a, b := s.Rope.pair(j, s.RotDim)
			want := [2]uint16{p.rows[a], p.rows[b]}
			x, y := s.Rope.pair(pairPlace(word).pair(), s.RotDim)
			if pairPlace(word).swapped() {
				x, y = y, x
			}
			if want != [2]uint16{uint16(x), uint16(y)} {
				t.Errorf("%v, place %d: rows %v, want %d and %d", s, j, want, x, y)
			}
			if x != a {
				moved++
			}
		}
		if s.RotDim > 2 && moved == 0 {
			t.Errorf("%v: no pair has moved", s)
		}
		for i, row := range p.rows[s.RotDim:] {
			if int(row) < s.RotDim {
				t.Errorf("%v: rotated row %d stands at %d, which is not rotated", s, row, s.RotDim+i)
			}
		}
	}
}

func TestLayersAndHeadsDiffer(t *testing.T) {
	p := draw(t, shapes[1], 4)
	seen := map[string]bool{}
	for layer := range p.shape.Layers {
		for h := range p.shape.HeadsKV {
			seen[fmt.Sprint(p.valueRows(layer, h))] = true
		}
	}
	if want := p.shape.Layers * p.shape.HeadsKV; len(seen) != want {
		t.Errorf("%d different permutations of values, want %d", len(seen), want)
	}
}

// The shielded output of a row that holds its own indices is known from Head; the inverse has to
// put every index where it came from.
func TestInverse(t *testing.T) {
	for _, s := range shapes {
		t.Run(s.String(), func(t *testing.T) {
			p, d := draw(t, s, 5), s.ValueDim
			for layer := range s.Layers {
				n := s.In(layer)
				shielded := make([]int, s.RowOf(layer))
				for h := range n.Heads {
					from, _ := p.Head(Query, layer, h)
					_, rows := p.Head(Value, layer, h/(n.Heads/n.KV))
					for i, row := range rows {
						shielded[h*d+i] = from*d + int(row)
					}
				}
				table := make([]uint16, s.RowOf(layer))
				p.Inverse(layer, table)
				for i, at := range table {
					if shielded[at] != i {
						t.Fatalf("layer %d: float %d comes back as %d", layer, i, shielded[at])
					}
				}
			}
		})
	}
}

func TestFactorsTakeTheFrequencyAlong(t *testing.T) {
	own := make([]float32, 32)
	for i := range own {
		own[i] = 1 + float32(i)/8
	}
	for _, tt := range []struct {
		name string
		own  []float32
	}{{"none", nil}, {"own", own}} {
		t.Run(tt.name, func(t *testing.T) {
			p := draw(t, shapes[1], 6)
			got, err := p.Factors(tt.own)
			if err != nil {
				t.Fatal(err)
			}
			negative := 0
			for j, f := range got {
				place := pairPlace(p.pairs[j])
				want := theta(p.shape, place.pair())
				if tt.own != nil {
					want /= float64(tt.own[place.pair()])
				}
				if place.swapped() {
					want, negative = -want, negative+1
				}
				if turn := theta(p.shape, j) / float64(f); math.Abs(turn/want-1) > 1e-5 {
					t.Errorf("place %d turns by %g, want %g", j, turn, want)
				}
			}
			if negative == 0 || negative == len(got) {
				t.Errorf("%d of %d pairs are swapped", negative, len(got))
			}
		})
	}
}

func theta(s Shape, j int) float64 {
	return math.Pow(float64(s.Base), -2*float64(j)/float64(s.RotDim))
}

// The engine's F32 products and the factor's rounding are all that may be left of a difference.
func TestAnglesAgreeInSinglePrecision(t *testing.T) {
	s := Shape{Layers: 1, Heads: 1, HeadsKV: 1, KeyDim: 128, ValueDim: 8, RotDim: 128, Rope: RopeNorm, Base: 10000}
	p := draw(t, s, 7)
	list, err := p.Factors(nil)
	if err != nil {
		t.Fatal(err)
	}
	step := float32(math.Pow(10000, -2.0/128))
	for position := 1; position <= 4096; position += 13 {
		engine := make([]float32, s.RotDim/2)
		for j, angle := 0, float32(position); j < len(engine); j++ {
			engine[j] = angle
			angle *= step
		}
		for j, f := range list {
			place := pairPlace(p.pairs[j])
			want := float64(engine[place.pair()])
			if place.swapped() {
				want = -want
			}
			if got := float64(engine[j] / f); math.Abs(got/want-1) > 1.5e-6 {
				t.Fatalf("position %d, place %d: angle %g, want %g", position, j, got, want)
			}
		}
	}
}

func TestFactorsOutOfRange(t *testing.T) {
	p := draw(t, shapes[0], 8)
	for _, bad := range []float32{0, 1e-45, float32(math.Inf(1)), float32(math.NaN())} {
		_, err := p.Factors([]float32{1, bad, 1, 1})
		var invalid *enclave.InvalidError
		if !errors.As(err, &invalid) {
			t.Errorf("own factor %g: %v, want an InvalidError", bad, err)
		}
	}
}

func TestDrawNeedsALiveRoot(t *testing.T) {
	root, err := keys.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	root.Destroy()
	if _, err := Draw(shapes[0], root); err == nil {
		t.Error("a destroyed root gave a permutation")
	}
}

func TestWipeTakesTheTables(t *testing.T) {
	p := draw(t, shapes[0], 9)
	p.Wipe()
	if p.pairs != nil || p.rows != nil || p.heads != nil || p.values != nil {
		t.Error("a table is still reachable")
	}
	defer func() {
		if recover() == nil {
			t.Error("the memory is still there")
		}
	}()
	p.mem.Bytes()
}
