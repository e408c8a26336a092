package audit

import "math"

// Rotary is the rotary embedding of layer 0, as far as undoing it takes: which elements of a head form pairs, and by how much
// a pair turns from one position to the next.
type Rotary struct {
	Pairs       [][2]int  // empty: keys are not rotated
	Frequencies []float64 // radians, one for each pair
}

// singles are the elements of a head that are in no pair.
func (r Rotary) singles(headDim int) []int {
	paired := make([]bool, headDim)
	for _, p := range r.Pairs {
		paired[p[0]], paired[p[1]] = true, true
	}
	var out []int
	for i, p := range paired {
		if !p {
			out = append(out, i)
		}
	}
	return out
}

// undo turns a row of keys back to position 0, in place.
func (r Rotary) undo(row []float32, heads, position int) {
	dim := len(row) / heads
	for j, p := range r.Pairs {
		sin, cos := math.Sincos(r.Frequencies[j] * float64(position))
		for h := range heads {
			a, b := &row[h*dim+p[0]], &row[h*dim+p[1]]
			x, y := float64(*a), float64(*b)
			*a, *b = float32(x*cos+y*sin), float32(y*cos-x*sin)
		}
	}
}

// Undone returns the snapshot's keys of layer 0 as they were at position 0.
func (r Rotary) Undone(s *Snapshot) Matrix {
	k := s.Layers[0].K
	out := Matrix{k.Rows, k.Cols, append([]float32(nil), k.Data...)}
	for i := range out.Rows {
		r.undo(out.Row(i), s.HeadsKV, s.Position(i))
	}
	return out
}

// MeasureRotary finds out how a model rotates its keys (RoFormer, arXiv 2104.09864): each matrix holds layer 0's keys of one
// token, at position 0, 1, 2 and so on. Pairs are neighbours, or half of the rotated elements apart; a pair's length
// stays the same from position to position, which tells the two and how many elements are rotated. So no table of architectures
// is needed, and scaled variants (YaRN, long-rope) are measured as they are.
func MeasureRotary(runs []Matrix, heads int) Rotary {
	var best Rotary
	bestError := math.Inf(1)
	dim := runs[0].Cols / heads
	if still(runs) {
		return Rotary{}
	}
	for rotated := dim &^ 1; rotated > 0; rotated -= 2 {
		for _, neox := range []bool{false, true} {
			pairs := pairsOf(rotated, neox)
			if e := magnitudeError(runs, heads, pairs, rotated); e < 0.9*bestError {
				best, bestError = Rotary{Pairs: pairs}, e
			}
		}
	}
	best.Frequencies = make([]float64, len(best.Pairs))
	for j := range best.Pairs {
		best.Frequencies[j] = frequency(runs, heads, best.Pairs[j])
	}
	return best
}

func pairsOf(rotated int, neox bool) [][2]int {
	pairs := make([][2]int, rotated/2)
	for i := range pairs {
		pairs[i] = [2]int{2 * i, 2*i + 1}
		if neox {
			pairs[i] = [2]int{i, i + rotated/2}
		}
	}
	return pairs
}

// still says that keys do not depend on the position.
func still(runs []Matrix) bool {
	for _, m := range runs {
		if distance(m.Row(0), m.Row(m.Rows-1)) > 0.01*norm(m.Row(0)) {
			return false
		}
	}
	return true
}

// magnitudeError is by how much the pairs' magnitudes and the other elements change over the positions, relative to the keys.
func magnitudeError(runs []Matrix, heads int, pairs [][2]int, rotated int) float64 {
	var sum, size float64
	for _, m := range runs {
		dim := m.Cols / heads
		for h := range heads {
			first := m.Head(0, h, dim)
			for i := 1; i < m.Rows; i += max(1, m.Rows/32) {
				row := m.Head(i, h, dim)
				for _, p := range pairs {
					d := hypot(row, p) - hypot(first, p)
					sum += d * d
				}
				for j := rotated; j < dim; j++ {
					d := float64(row[j] - first[j])
					sum += d * d
				}
				size += float64(dot(row, row))
			}
		}
	}
	return sum / max(size, math.SmallestNonzeroFloat64)
}

func hypot(row []float32, pair [2]int) float64 {
	return math.Hypot(float64(row[pair[0]]), float64(row[pair[1]]))
}

// frequency measures the turn of a pair from position to position: first over one step, which is never half a
// turn, then over ever more, where each estimate says how often the next one went around.
func frequency(runs []Matrix, heads int, pair [2]int) float64 {
	estimate := 0.0
	for step := 1; step < runs[0].Rows; step *= 2 {
		var re, im float64 // sum of conj(k at 0)·(k at step), longer pairs counting more
		for _, m := range runs {
			dim := m.Cols / heads
			for h := range heads {
				for i := 0; i+step < m.Rows; i += max(1, (m.Rows-step)/16) {
					a, b := m.Head(i, h, dim), m.Head(i+step, h, dim)
					ax, ay, bx, by := float64(a[pair[0]]), float64(a[pair[1]]), float64(b[pair[0]]), float64(b[pair[1]])
					re += ax*bx + ay*by
					im += ax*by - ay*bx
				}
			}
		}
		angle := math.Atan2(im, re)
		turns := math.Round((estimate*float64(step) - angle) / (2 * math.Pi))
		estimate = (angle + 2*math.Pi*turns) / float64(step)
	}
	return estimate
}
