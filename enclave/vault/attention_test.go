package vault

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/kvshield/kvshield/internal/gguf"
)

// reference computes a layer's attention in double precision, from the bytes of a model.
type reference struct {
	sample
	tensors map[string][]byte
	factors []float64
}

func newReference(s sample, tensors map[string][]byte) *reference {
	r := &reference{s, tensors, nil}
	if raw, ok := tensors["rope_freqs.weight"]; ok {
		r.factors = decode(gguf.F32, raw)
	}
	return r
}

// project multiplies a weight with an input, and adds the bias if there is one.
func (r *reference) project(layer int, name string, x []float64) []float64 {
	prefix := fmt.Sprintf("blk.%d.%s", layer, name)
	weight := decode(r.kind, r.tensors[prefix+".weight"])
	var bias []float64
	if raw, ok := r.tensors[prefix+".bias"]; ok {
		bias = decode(gguf.F32, raw)
	}
	y := make([]float64, len(weight)/len(x))
	for i := range y {
		for j := range x {
			y[i] += weight[i*len(x)+j] * x[j]
		}
		if bias != nil {
			y[i] += bias[i]
		}
	}
	return y
}

// rotate applies the rotary embedding to all heads. The frequencies are powers of the step that
// engines round to single precision.
func (r *reference) rotate(x []float64, position int) []float64 {
	step := float64(float32(math.Pow(float64(r.base), -2/float64(r.rot))))
	for head := 0; head < len(x); head += r.dim {
		for j := range r.rot / 2 {
			angle := float64(position) * math.Pow(step, float64(j))
			if r.factors != nil {
				angle /= r.factors[j]
			}
			sin, cos := math.Sincos(angle)
			a, b := x[head+2*j], x[head+2*j+1]
			x[head+2*j], x[head+2*j+1] = a*cos-b*sin, a*sin+b*cos
		}
	}
	return x
}

// cache is what an engine would cache of a layer, token by token.
type cache struct{ keys, values, queries [][]float64 }

func (r *reference) run(layer int, inputs [][]float64, positions []int) cache {
	var c cache
	for i, x := range inputs {
		c.queries = append(c.queries, r.rotate(r.project(layer, "attn_q", x), positions[i]))
		c.keys = append(c.keys, r.rotate(r.project(layer, "attn_k", x), positions[i]))
		c.values = append(c.values, r.project(layer, "attn_v", x))
	}
	return c
}

// attend returns the attention output of the token at index i over all tokens up to it.
func (r *reference) attend(c cache, i int) []float64 {
	out := make([]float64, r.heads*r.values)
	for h := range r.heads {
		kv := h / (r.heads / r.kv)
		weights, sum := make([]float64, i+1), 0.0
		for t := range weights {
			dot := 0.0
			for d := range r.dim {
				dot += c.queries[i][h*r.dim+d] * c.keys[t][kv*r.dim+d]
			}
			weights[t] = math.Exp(dot / math.Sqrt(float64(r.dim)))
			sum += weights[t]
		}
		for t, w := range weights {
			for d := range r.values {
				out[h*r.values+d] += w / sum * c.values[t][kv*r.values+d]
			}
		}
	}
	return out
}

// rowSources finds, by their bytes, which row of the true tensor every shielded row is.
func rowSources(t *testing.T, plain, shielded []byte, rows int) []int {
	t.Helper()
	size := len(plain) / rows
	at := map[string]int{}
	for i := range rows {
		at[string(plain[i*size:(i+1)*size])] = i
	}
	sources := make([]int, rows)
	for i := range rows {
		from, ok := at[string(shielded[i*size:(i+1)*size])]
		if !ok {
			t.Fatalf("row %d is not a row of the true tensor, or is there twice", i)
		}
		delete(at, string(shielded[i*size:(i+1)*size]))
		sources[i] = from
	}
	return sources
}

func inputs(s sample, n int, random *rand.Rand) (list [][]float64, positions []int) {
	for i := range n {
		x := make([]float64, s.width)
		for j := range x {
			x[j] = random.NormFloat64() * 0.5
		}
		list, positions = append(list, x), append(positions, i*2000/(n-1))
	}
	return list, positions
}

var samples = []sample{
	standard,
	with(func(s *sample) { s.own = true }),
	with(func(s *sample) { s.bias, s.kind = true, gguf.Q8_0 }),
	with(func(s *sample) { s.dim, s.values, s.rot, s.kind = 8, 8, 8, gguf.F32 }),
	with(func(s *sample) { s.dim, s.values, s.rot, s.base, s.kind = 64, 64, 64, 500000, gguf.Q8_0 }),
	with(func(s *sample) { s.heads, s.dim, s.values, s.rot, s.own = 2, 128, 128, 128, true }),
	with(func(s *sample) { s.kv, s.files = 1, 3 }),
	with(func(s *sample) { s.heads, s.kv = 4, 4 }),
	with(func(s *sample) { s.heads, s.kv, s.rot, s.bias = 6, 2, 8, true }),
	with(func(s *sample) { s.dim, s.rot, s.values, s.own, s.files = 32, 24, 8, true, 2 }),
}

func (s sample) String() string {
	return fmt.Sprintf("heads=%d-%d,dim=%d-%d,rot=%d,%v,own=%v,bias=%v,files=%d", s.heads, s.kv, s.dim, s.values, s.rot, s.kind, s.own, s.bias, s.files)
}

func TestAttentionStaysExact(t *testing.T) {
	for i, s := range samples {
		t.Run(s.String(), func(t *testing.T) {
			v := New(Options{})
			from := s.build(t, uint64(i))
			res, to := load(t, v, from)
			truth, shielded := newReference(s, contents(t, from)), newReference(s, contents(t, to))
			random := rand.New(rand.NewPCG(uint64(i), 2))
			for layer := range s.layers {
				x, positions := inputs(s, 24, random)
				want, got := truth.run(layer, x, positions), shielded.run(layer, x, positions)
				checkCache(t, truth, shielded, layer, want, got, positions)
				for i := range x {
					in, out := make([]float32, res.RowFloats), make([]float32, res.RowFloats)
					for j, y := range shielded.attend(got, i) {
						in[j] = float32(y)
					}
					if err := v.Invert(res.ID, layer, out, in); err != nil {
						t.Fatal(err)
					}
					near(t, fmt.Sprintf("layer %d, position %d: attention output", layer, positions[i]), positions[i], out, truth.attend(want, i))
				}
			}
		})
	}
}

func near(t *testing.T, what string, position int, got []float32, want []float64) {
	t.Helper()
	// A frequency factor is rounded to F32, so the error of an angle grows with the position, as that of a key does.
	limit := 1e-5 + float64(position)*0x1p-23
	for j := range want {
		if math.Abs(float64(got[j])-want[j]) > limit {
			t.Fatalf("%s: float %d is %g, want %g", what, j, got[j], want[j])
		}
	}
}

// checkCache compares what an engine caches of the two models: values are the same numbers in
// another order; keys too, but for the rounding of a frequency factor.
func checkCache(t *testing.T, truth, shielded *reference, layer int, want, got cache, positions []int) {
	t.Helper()
	rows := func(name string, n int) []int {
		name = fmt.Sprintf("blk.%d.%s.weight", layer, name)
		return rowSources(t, truth.tensors[name], shielded.tensors[name], n)
	}
	keys, values := rows("attn_k", truth.kv*truth.dim), rows("attn_v", truth.kv*truth.values)
	if inOrder(keys) || inOrder(values) {
		t.Errorf("layer %d: keys or values are not permuted", layer)
	}
	for i, position := range positions {
		for d, from := range values {
			if got.values[i][d] != want.values[i][from] {
				t.Fatalf("layer %d, token %d: value %d is %g, want %g", layer, i, d, got.values[i][d], want.values[i][from])
			}
		}
		limit := 1e-6 + float64(position)*0x1p-22
		for d, from := range keys {
			if math.Abs(got.keys[i][d]-want.keys[i][from]) > limit {
				t.Fatalf("layer %d, position %d: key %d is %g, want %g", layer, position, d, got.keys[i][d], want.keys[i][from])
			}
		}
	}
}

func inOrder(list []int) bool {
	for i, x := range list {
		if i != x {
			return false
		}
	}
	return true
}
