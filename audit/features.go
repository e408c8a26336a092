package audit

import (
	"math"
	"slices"
)

// Features that a permutation of elements within heads, and of heads, leaves as they are.

// sortedSum sorts the elements of each head and adds the heads up, element by element: dimension numbers. A sum, because the
// order of the heads is not known, and one that depends on their content jumps where two are alike.
func sortedSum(heads int) (cols func(rowLen int) int, f func(dst, src []float32)) {
	cols = func(rowLen int) int { return rowLen / heads }
	return cols, func(dst, src []float32) {
		dim := len(src) / heads
		head := make([]float32, dim)
		for h := range heads {
			copy(head, src[h*dim:(h+1)*dim])
			slices.Sort(head)
			for i, v := range head {
				dst[i] += v
			}
		}
	}
}

// sortedNorms are the lengths of the heads, the shortest first: one number a head.
func sortedNorms(heads int) func(dst, src []float32) {
	return func(dst, src []float32) {
		dim := len(src) / heads
		for h := range heads {
			dst[h] = norm(src[h*dim : (h+1)*dim])
		}
		slices.Sort(dst[:heads])
	}
}

// magnitudes replaces a row of keys by the magnitudes of its rotary pairs, and of the elements in no pair: what neither
// the position nor a permutation of pairs changes.
func (r Rotary) magnitudes(heads int) (cols func(rowLen int) int, f func(dst, src []float32)) {
	cols = func(rowLen int) int { return rowLen - heads*len(r.Pairs) }
	return cols, func(dst, src []float32) {
		dim := len(src) / heads
		singles := r.singles(dim)
		out := dim - len(r.Pairs)
		for h := range heads {
			head, to := src[h*dim:(h+1)*dim], dst[h*out:(h+1)*out]
			for j, p := range r.Pairs {
				to[j] = float32(hypot(head, p))
			}
			for j, s := range singles {
				to[len(r.Pairs)+j] = float32(math.Abs(float64(head[s])))
			}
		}
	}
}

// beside puts two matrices of as many rows side by side.
func beside(a, b Matrix) Matrix {
	out := NewMatrix(a.Rows, a.Cols+b.Cols)
	for i := range out.Rows {
		copy(out.Row(i), a.Row(i))
		copy(out.Row(i)[a.Cols:], b.Row(i))
	}
	return out
}
