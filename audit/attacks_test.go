package audit

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

const (
	testVocabulary = 400
	testHeads      = 3
	testDim        = 8
	testTokens     = 600
)

// world is a public model's layer 0, made up, and a conversation in it.
type world struct {
	public *Public
	truth  []int32
}

func newWorld(seed uint64) *world {
	r := rand.New(rand.NewPCG(seed, 5))
	w := &world{public: &Public{HeadsKV: testHeads, K: gaussian(r, testVocabulary), V: gaussian(r, testVocabulary), Start: -1, Prior: make([]float64, testVocabulary)}}
	w.public.Rotary = Rotary{Pairs: pairsOf(testDim, true), Frequencies: []float64{1, 0.3, 0.09, 0.027}}
	total := 0.0
	for i := range w.public.Prior {
		w.public.Prior[i] = 1 / float64(i+2)
		total += w.public.Prior[i]
	}
	for i := range w.public.Prior {
		w.public.Prior[i] /= total
	}
	for range testTokens {
		x, t := r.Float64(), 0
		for x -= w.public.Prior[0]; x > 0 && t < testVocabulary-1; x -= w.public.Prior[t] {
			t++
		}
		w.truth = append(w.truth, int32(t))
	}
	return w
}

func gaussian(r *rand.Rand, rows int) Matrix {
	m := NewMatrix(rows, testHeads*testDim)
	for i := range m.Data {
		m.Data[i] = float32(r.NormFloat64())
	}
	return m
}

// cached is the conversation's cache, and a little noise as rounding makes it.
func (w *world) cached(truth []int32) *Snapshot {
	r := rand.New(rand.NewPCG(9, 9))
	k, v := NewMatrix(len(truth), w.public.K.Cols), NewMatrix(len(truth), w.public.V.Cols)
	turn := w.public.Rotary
	turn.Frequencies = slices.Clone(turn.Frequencies)
	for i := range turn.Frequencies {
		turn.Frequencies[i] *= -1
	}
	for i, t := range truth {
		copy(k.Row(i), w.public.K.Row(int(t)))
		copy(v.Row(i), w.public.V.Row(int(t)))
		turn.undo(k.Row(i), testHeads, i)
	}
	for i := range k.Data {
		k.Data[i] *= 1 + float32(2e-4*r.NormFloat64())
		v.Data[i] *= 1 + float32(2e-4*r.NormFloat64())
	}
	return &Snapshot{Source: SlotFile, Type: "F16", HeadsKV: testHeads, Layers: []Layer{{k, v}}}
}

// permuted moves heads, rotary pairs of keys and elements of values, as mode permute does.
func permuted(s *Snapshot) *Snapshot {
	r := rand.New(rand.NewPCG(11, 11))
	heads, pairs := r.Perm(testHeads), r.Perm(testDim/2)
	values := [testHeads][]int{}
	for h := range values {
		values[h] = r.Perm(testDim)
	}
	out := *s
	move := func(m Matrix, from func(h, i int) int) Matrix {
		return mapRows(m, m.Cols, func(dst, src []float32) {
			for h := range testHeads {
				for i := range testDim {
					dst[h*testDim+i] = src[heads[h]*testDim+from(h, i)]
				}
			}
		})
	}
	half := testDim / 2
	out.Layers = []Layer{{
		K: move(s.Layers[0].K, func(_, i int) int { return pairs[i%half] + i/half*half }),
		V: move(s.Layers[0].V, func(h, i int) int { return values[h][i] }),
	}}
	return &out
}

// masked multiplies the values of each head with a random orthogonal matrix, or with a general invertible one.
func masked(s *Snapshot, orthogonal bool) *Snapshot {
	r := rand.New(rand.NewPCG(12, 12))
	masks := [testHeads]Matrix{}
	for h := range masks {
		masks[h] = gaussianSquare(r)
		if orthogonal {
			orthonormalise(masks[h])
		}
	}
	out := *s
	out.Layers = []Layer{{K: s.Layers[0].K, V: mapRows(s.Layers[0].V, s.Layers[0].V.Cols, func(dst, src []float32) {
		for h := range testHeads {
			for i := range testDim {
				dst[h*testDim+i] = dot(masks[h].Row(i), src[h*testDim:(h+1)*testDim])
			}
		}
	})}}
	return &out
}

func gaussianSquare(r *rand.Rand) Matrix {
	m := NewMatrix(testDim, testDim)
	for i := range m.Data {
		m.Data[i] = float32(r.NormFloat64())
	}
	return m
}

func orthonormalise(m Matrix) {
	for i := range m.Rows {
		for j := range i {
			p := dot(m.Row(i), m.Row(j))
			for c := range m.Cols {
				m.Row(i)[c] -= p * m.Row(j)[c]
			}
		}
		n := norm(m.Row(i))
		for c := range m.Cols {
			m.Row(i)[c] /= n
		}
	}
}

func find(t *testing.T, key string) Attack {
	t.Helper()
	for _, a := range Attacks() {
		if a.Key == key {
			return a
		}
	}
	t.Fatalf("there is no attack %q", key)
	return Attack{}
}

func TestAttacksReadWhatTheyShould(t *testing.T) {
	w, other := newWorld(1), newWorld(2)
	plain := w.cached(w.truth)
	control := w.cached(other.truth)
	const all, nothing = 0.99, 0.1
	for _, c := range []struct {
		attack, cache string
		snapshot      *Snapshot
		least, atMost float64
	}{
		{"naive-values", "plain", plain, all, 1},
		{"naive-keys", "plain", plain, all, 1},
		{"sorted-values", "plain", plain, all, 1},
		{"head-norms", "plain", plain, all, 1},
		{"pair-magnitudes", "plain", plain, all, 1},
		{"gram-matrix", "plain", plain, all, 1},
		{"known-prefix-32", "plain", plain, all, 1},
		{"naive-values", "permuted", permuted(plain), 0, nothing},
		{"naive-keys", "permuted", permuted(plain), 0, nothing},
		{"sorted-values", "permuted", permuted(plain), all, 1},
		{"head-norms", "permuted", permuted(plain), all, 1},
		{"pair-magnitudes", "permuted", permuted(plain), all, 1},
		{"gram-matrix", "permuted", permuted(plain), all, 1},
		{"known-prefix-8", "permuted", permuted(plain), all, 1},
		{"known-prefix-32", "permuted", permuted(plain), all, 1},
		{"sorted-values", "rotated", masked(plain, true), 0, nothing},
		{"head-norms", "rotated", masked(plain, true), all, 1},
		{"gram-matrix", "rotated", masked(plain, true), all, 1},
		{"known-prefix-16", "rotated", masked(plain, true), all, 1},
		{"naive-values", "masked", masked(plain, false), 0, nothing},
		{"known-prefix-64", "masked", masked(plain, false), all, 1},
		{"known-prefix-128", "masked", masked(plain, false), all, 1},
		{"whitening", "masked", masked(plain, false), 0.05, 1},
	} {
		t.Run(c.attack+" "+c.cache, func(t *testing.T) {
			o, err := Evaluate(context.Background(), find(t, c.attack), &Case{Snapshot: c.snapshot, Truth: w.truth, Public: w.public, Other: control})
			if err != nil {
				t.Fatal(err)
			}
			if o.Skipped != "" || o.Score.Rate < c.least || o.Score.Rate > c.atMost {
				t.Errorf("recovered %.3f, want %v to %v; %s", o.Score.Rate, c.least, c.atMost, o.Skipped)
			}
			// An attack cannot see what is not there: both controls are down at chance.
			if limit := Chance(w.truth) + 0.05; o.Random > limit || o.Other > limit {
				t.Errorf("controls %.3f and %.3f, chance is %.3f", o.Random, o.Other, Chance(w.truth))
			}
		})
	}
}

func TestNothingIsReadFromZeros(t *testing.T) {
	w := newWorld(1)
	n := len(w.truth)
	zeros := &Snapshot{HeadsKV: testHeads, Layers: []Layer{{NewMatrix(n, testHeads*testDim), NewMatrix(n, testHeads*testDim)}}}
	for _, a := range Attacks() {
		if a.Engine {
			continue
		}
		o, err := Evaluate(context.Background(), a, &Case{Snapshot: zeros, Truth: w.truth, Public: w.public})
		if err != nil {
			t.Errorf("%s: %v", a.Key, err)
		} else if o.Score.Rate > Chance(w.truth) {
			t.Errorf("%s: recovers %.3f from zeros", a.Key, o.Score.Rate)
		}
	}
}

func TestWeightMatching(t *testing.T) {
	w := newWorld(1)
	perm := rand.New(rand.NewPCG(1, 1)).Perm(testHeads * testDim)
	var weights Weights
	for i := range perm {
		weights.PublicV = append(weights.PublicV, []byte{byte(i), 1, 2, 3})
	}
	s := w.cached(w.truth)
	v := s.Layers[0].V
	s.Layers[0].V = mapRows(v, v.Cols, func(dst, src []float32) {
		for i, j := range perm {
			dst[i] = src[j]
		}
	})
	for _, j := range perm {
		weights.ShieldedV = append(weights.ShieldedV, weights.PublicV[j])
	}
	o, err := Evaluate(context.Background(), weightMatching, &Case{Snapshot: s, Truth: w.truth, Public: w.public, Weights: &weights})
	if err != nil || o.Score.Rate < 0.99 {
		t.Errorf("%+v, %v", o, err)
	}
	o, err = Evaluate(context.Background(), weightMatching, &Case{Snapshot: s, Truth: w.truth, Public: w.public})
	if err != nil || o.Skipped == "" {
		t.Errorf("without weights: %+v, %v", o, err)
	}
}

// An attack gets the tokens that it says it knows, and no more.
func TestAttacksAreToldNoMoreThanTheySay(t *testing.T) {
	w := newWorld(1)
	var told int
	spy := Attack{Known: 5, Attacker: A4, Run: func(_ context.Context, e *Evidence) (*Guess, error) {
		told = len(e.Known)
		if cap(e.Known) > len(e.Known) {
			t.Error("the rest of the conversation can be reached through the known tokens")
		}
		return &Guess{}, nil
	}}
	if _, err := Evaluate(context.Background(), spy, &Case{Snapshot: w.cached(w.truth), Truth: w.truth, Public: w.public}); err != nil || told != 5 {
		t.Errorf("told %d tokens, %v", told, err)
	}
}

func TestRepetitionTellsEqualFromDifferent(t *testing.T) {
	w := newWorld(1)
	o, err := Evaluate(context.Background(), repetition, &Case{Snapshot: masked(w.cached(w.truth), false), Truth: w.truth, Public: w.public})
	if err != nil {
		t.Fatal(err)
	}
	if o.Score.Figures["auc"] < 0.999 || o.Score.Figures["f1"] < 0.99 {
		t.Errorf("%v", o.Score.Figures)
	}
}

func TestMeasureRotary(t *testing.T) {
	for _, c := range []struct {
		name string
		want Rotary
	}{
		{"neighbours", Rotary{pairsOf(8, false), []float64{1, 0.1, 0.01, 0.001}}},
		{"halves", Rotary{pairsOf(8, true), []float64{1, 0.25, 0.05, 0.004}}},
		{"partial", Rotary{pairsOf(4, true), []float64{1, 0.02}}},
		{"none", Rotary{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(4, 4))
			var runs []Matrix
			for range 4 {
				m := NewMatrix(512, testHeads*testDim)
				first := gaussian(r, 1).Row(0)
				back := Rotary{c.want.Pairs, make([]float64, len(c.want.Frequencies))}
				for j, f := range c.want.Frequencies {
					back.Frequencies[j] = -f
				}
				for i := range m.Rows {
					copy(m.Row(i), first)
					back.undo(m.Row(i), testHeads, i)
				}
				runs = append(runs, m)
			}
			got := MeasureRotary(runs, testHeads)
			if !slices.Equal(got.Pairs, c.want.Pairs) {
				t.Fatalf("pairs %v, want %v", got.Pairs, c.want.Pairs)
			}
			for j, f := range c.want.Frequencies {
				if math.Abs(got.Frequencies[j]-f) > 1e-5 {
					t.Errorf("pair %d turns by %v, want %v", j, got.Frequencies[j], f)
				}
			}
		})
	}
}
