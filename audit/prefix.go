package audit

import (
	"context"
	"fmt"

	"gonum.org/v1/gonum/mat"
)

// ridge keeps directions of which the known rows say nothing from drowning the rest in rounding errors, relative to
// the rows' own size.
const ridge = 1e-5

// knownPrefix solves for the linear map from cached rows to true ones by the first m tokens, which every chat template and every
// system prompt gives away, and decodes the rest (least squares on known pairs: docs/threat-model.md; arXiv 2508.09442, section 4).
func knownPrefix(m int) Attack {
	return Attack{
		Key: fmt.Sprintf("known-prefix-%d", m), Title: fmt.Sprintf("least squares from %d known tokens", m), Attacker: A4, Known: m,
		Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
			if len(e.Known) < m {
				return nil, &Skip{fmt.Sprintf("the conversation has no %d tokens to know and more to find", m)}
			}
			known := make([]pair, m)
			for i := range known {
				known[i] = pair{i, e.Known[i]}
			}
			found, err := leastSquares(e, known)
			if err != nil {
				return nil, err
			}
			return guessOf(found, "values of layer 0"), nil
		},
	}
}

const (
	selfKnown  = 8
	selfRounds = 6
	selfMax    = 512
)

// selfTraining starts like knownPrefix and takes its own sure guesses for known in the next round (bootstrapping: masking study
// of kvshield, docs/threat-model.md).
var selfTraining = Attack{
	Key: "self-training", Title: fmt.Sprintf("least squares from %d known tokens, then from its own sure guesses", selfKnown), Attacker: A4, Known: selfKnown, Grows: true,
	Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
		if len(e.Known) < selfKnown {
			return nil, &Skip{fmt.Sprintf("the conversation has no %d tokens to know and more to find", selfKnown)}
		}
		var known []pair
		for i, t := range e.Known[:selfKnown] {
			known = append(known, pair{i, t})
		}
		var found []match
		for range selfRounds {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			var err error
			if found, err = leastSquares(e, known); err != nil {
				return nil, err
			}
			more := known[:selfKnown:selfKnown]
			for _, row := range surest(found, selfMax) {
				if row >= selfKnown {
					more = append(more, pair{row, found[row].row})
				}
			}
			if len(more) == len(known) {
				break
			}
			known = more
		}
		return guessOf(found, "values of layer 0"), nil
	},
}

// pair is a cached row of which the token is taken for known.
type pair struct {
	row   int
	token int32
}

// leastSquares maps cached rows to true ones by the known pairs, and looks for the nearest token there. With fewer pairs
// than dimensions the map reaches only what the known rows span: the dictionary is projected likewise.
//
// Let P be the true known rows and Y the cached ones. The map of least norm takes y to Pᵀ(YYᵀ)⁻¹Y·y, of which the coordinates in
// the span of P, whitened by L of PPᵀ = LLᵀ, are L⁻¹PPᵀ(YYᵀ)⁻¹Y·y; those of a token's row x are L⁻¹P·x.
func leastSquares(e *Evidence, known []pair) ([]match, error) {
	v := e.Snapshot.Layers[0].V
	p, y := NewMatrix(len(known), v.Cols), NewMatrix(len(known), v.Cols)
	for i, k := range known {
		copy(p.Row(i), e.Public.V.Row(int(k.token)))
		copy(y.Row(i), v.Row(k.row))
	}
	if isZero(y.Data) {
		return nil, errNothing
	}
	gp, gy := gram(p), gram(y)
	var cp, cy mat.Cholesky
	if !cp.Factorize(gp) || !cy.Factorize(gy) {
		return nil, &Skip{"the known rows cannot be solved for a map"}
	}
	var l, lInv mat.TriDense
	cp.LTo(&l)
	if err := lInv.InverseTri(&l); err != nil {
		return nil, &Skip{"the known rows cannot be solved for a map"}
	}
	var fromCached, fromTrue mat.Dense
	var solved mat.Dense
	if err := cy.SolveTo(&solved, dense(y)); err != nil {
		return nil, &Skip{"the known rows cannot be solved for a map"}
	}
	fromCached.Product(&lInv, gp, &solved)
	fromTrue.Mul(&lInv, dense(p))
	dictionary := timesTransposed(e.Public.V, single(&fromTrue))
	return newIndex(dictionary).nearest(timesTransposed(v, single(&fromCached))), nil
}

// gram is m·mᵀ with the ridge on its diagonal.
func gram(m Matrix) *mat.SymDense {
	d := dense(m)
	var g mat.SymDense
	g.SymOuterK(1, d)
	n := m.Rows
	extra := ridge * mat.Trace(&g) / float64(n)
	for i := range n {
		g.SetSym(i, i, g.At(i, i)+extra)
	}
	return &g
}

func dense(m Matrix) *mat.Dense {
	d := mat.NewDense(m.Rows, m.Cols, nil)
	for i := range m.Rows {
		for j, v := range m.Row(i) {
			d.Set(i, j, float64(v))
		}
	}
	return d
}

func single(d *mat.Dense) Matrix {
	rows, cols := d.Dims()
	m := NewMatrix(rows, cols)
	for i := range rows {
		for j := range cols {
			m.Data[i*cols+j] = float32(d.At(i, j))
		}
	}
	return m
}
