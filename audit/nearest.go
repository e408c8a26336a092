package audit

import (
	"math"
	"math/rand/v2"
	"runtime"
	"sync"

	"gonum.org/v1/gonum/blas"
	"gonum.org/v1/gonum/blas/blas32"
)

const (
	// screenDims is to how many dimensions rows are projected to find candidates, shortlist how many candidates are then
	// compared in full. A random projection of that size keeps distances within some 20 % (Johnson and Lindenstrauss,
	// 1984); a match lies orders of magnitude nearer than the rest.
	screenDims = 48
	shortlist  = 8
	blockRows  = 2048 // of the dictionary, compared with all queries in one multiplication
)

// index finds the nearest of many rows.
type index struct {
	rows   Matrix // as given
	screen Matrix // projected; rows itself when that is narrow
	basis  Matrix // screenDims × cols, or empty
	norms  []float32
}

func newIndex(rows Matrix) *index {
	ix := &index{rows: rows, screen: rows}
	if rows.Cols > screenDims {
		ix.basis = randomBasis(screenDims, rows.Cols)
		ix.screen = timesTransposed(rows, ix.basis)
	}
	ix.norms = make([]float32, rows.Rows)
	for i := range ix.norms {
		ix.norms[i] = dot(ix.screen.Row(i), ix.screen.Row(i))
	}
	return ix
}

func randomBasis(rows, cols int) Matrix {
	r := rand.New(rand.NewPCG(1, 2))
	m := NewMatrix(rows, cols)
	for i := range m.Data {
		m.Data[i] = float32(r.NormFloat64() / math.Sqrt(float64(rows)))
	}
	return m
}

// match is the nearest row of an index and how far it is, with the distance of the next one.
type match struct {
	row           int32
	first, second float32
}

// sure says that nothing else comes near.
func (m match) sure() bool { return m.row >= 0 && m.first < 0.5*m.second }

// nearest row for each query. A query of nothing but zeros has none.
func (ix *index) nearest(queries Matrix) []match {
	screened := queries
	if ix.basis.Rows > 0 {
		screened = timesTransposed(queries, ix.basis)
	}
	best := make([]shortList, queries.Rows)
	for i := range best {
		best[i].empty()
	}
	parts := inParallel(ix.rows.Rows, blockRows, func(from, to int) []shortList { return ix.scan(screened, from, to) })
	for _, part := range parts {
		for i := range best {
			best[i].merge(&part[i])
		}
	}
	out := make([]match, queries.Rows)
	for i := range out {
		out[i] = ix.exact(queries.Row(i), &best[i])
	}
	return out
}

// scan keeps for each query the nearest rows among from..to, by the projected distance less the query's own norm.
func (ix *index) scan(queries Matrix, from, to int) []shortList {
	best := make([]shortList, queries.Rows)
	for i := range best {
		best[i].empty()
	}
	part := Matrix{to - from, ix.screen.Cols, ix.screen.Data[from*ix.screen.Cols : to*ix.screen.Cols]}
	products := timesTransposed(queries, part)
	for i := range best {
		for j, p := range products.Row(i) {
			if d := ix.norms[from+j] - 2*p; d < best[i].far {
				best[i].add(int32(from+j), d)
			}
		}
	}
	return best
}

func (ix *index) exact(query []float32, list *shortList) match {
	inf := float32(math.Inf(1))
	m := match{-1, inf, inf}
	if isZero(query) {
		return m
	}
	for _, row := range list.rows {
		if row < 0 {
			continue
		}
		switch d := distance(query, ix.rows.Row(int(row))); {
		case d < m.first || d == m.first && row < m.row:
			m = match{row, d, m.first}
		case d < m.second:
			m.second = d
		}
	}
	return m
}

// shortList keeps the rows of the least distances, unordered.
type shortList struct {
	rows [shortlist]int32
	at   [shortlist]float32
	far  float32 // largest of at
}

func (s *shortList) empty() {
	for i := range s.rows {
		s.rows[i], s.at[i] = -1, float32(math.Inf(1))
	}
	s.far = float32(math.Inf(1))
}

func (s *shortList) add(row int32, d float32) {
	worst := 0
	for i := range s.at {
		if s.at[i] > s.at[worst] {
			worst = i
		}
	}
	s.rows[worst], s.at[worst] = row, d
	s.far = s.at[0]
	for _, a := range s.at {
		s.far = max(s.far, a)
	}
}

func (s *shortList) merge(o *shortList) {
	for i, row := range o.rows {
		if row >= 0 && o.at[i] < s.far {
			s.add(row, o.at[i])
		}
	}
}

// inParallel cuts n rows into blocks, handles them on all processors and returns the results in the blocks' order.
func inParallel[T any](n, block int, f func(from, to int) T) []T {
	out := make([]T, (n+block-1)/block)
	turn := make(chan struct{}, runtime.GOMAXPROCS(0))
	var wg sync.WaitGroup
	for i := range out {
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			out[i] = f(i*block, min(n, (i+1)*block))
		})
	}
	wg.Wait()
	return out
}

// timesTransposed is a·bᵀ.
func timesTransposed(a, b Matrix) Matrix {
	out := NewMatrix(a.Rows, b.Rows)
	if a.Rows > 0 && b.Rows > 0 && a.Cols > 0 {
		blas32.Gemm(blas.NoTrans, blas.Trans, 1, general(a), general(b), 0, general(out))
	}
	return out
}

func general(m Matrix) blas32.General {
	return blas32.General{Rows: m.Rows, Cols: m.Cols, Stride: m.Cols, Data: m.Data}
}

func dot(a, b []float32) float32 {
	return blas32.Dot(blas32.Vector{N: len(a), Inc: 1, Data: a}, blas32.Vector{N: len(b), Inc: 1, Data: b})
}

func norm(a []float32) float32 { return blas32.Nrm2(blas32.Vector{N: len(a), Inc: 1, Data: a}) }

func distance(a, b []float32) float32 {
	var sum float32
	for i := range a {
		d := a[i] - b[i]
		sum += d * d
	}
	return float32(math.Sqrt(float64(sum)))
}

func isZero(a []float32) bool {
	for _, v := range a {
		if v != 0 {
			return false
		}
	}
	return true
}

// mapRows computes a row of a new matrix from each row of m.
func mapRows(m Matrix, cols int, f func(dst, src []float32)) Matrix {
	out := NewMatrix(m.Rows, cols)
	inParallel(m.Rows, blockRows, func(from, to int) struct{} {
		for i := from; i < to; i++ {
			f(out.Row(i), m.Row(i))
		}
		return struct{}{}
	})
	return out
}
