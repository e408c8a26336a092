package audit

import (
	"context"
	"slices"

	"gonum.org/v1/gonum/mat"
)

// Whitening undoes every invertible linear map up to a rotation: the Mahalanobis length of a head, by the covariance of a long
// snapshot, is what it was, and is compared with the dictionary's, by the covariance that the model's own text has (whitening
// attacks: masking study of kvshield, docs/threat-model.md).
var whitening = Attack{
	Key: "whitening", Title: "Mahalanobis norms of each head", Attacker: A2, Grows: true,
	Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
		heads, v := e.Public.HeadsKV, e.Snapshot.Layers[0].V
		dim := v.Cols / heads
		if v.Rows <= dim {
			return nil, &Skip{"the snapshot has too few tokens for the covariance of a head"}
		}
		if isZero(v.Data) {
			return nil, errNothing
		}
		seen, err := mahalanobis(v, heads, uniform(v.Rows))
		if err != nil {
			return nil, err
		}
		dictionary, err := mahalanobis(e.Public.V, heads, e.Public.Prior)
		if err != nil {
			return nil, err
		}
		return nearestTokens(dictionary, seen, "values of layer 0"), nil
	},
}

func uniform(n int) []float64 {
	out := make([]float64, n)
	for i := range out {
		out[i] = 1 / float64(n)
	}
	return out
}

// mahalanobis returns for each row the Mahalanobis lengths of its heads, the shortest first, by the weighted mean and covariance of
// each head.
func mahalanobis(m Matrix, heads int, weights []float64) (Matrix, error) {
	out := NewMatrix(m.Rows, heads)
	dim := m.Cols / heads
	for h := range heads {
		mean, whiten, err := whitener(m, h, dim, weights)
		if err != nil {
			return Matrix{}, err
		}
		centred := mapRows(m, dim, func(dst, src []float32) {
			for j, x := range src[h*dim : (h+1)*dim] {
				dst[j] = x - mean[j]
			}
		})
		white := timesTransposed(centred, whiten)
		for i := range m.Rows {
			out.Row(i)[h] = norm(white.Row(i))
		}
	}
	for i := range out.Rows {
		slices.Sort(out.Row(i))
	}
	return out, nil
}

// whitener is a head's mean, and the inverse of its covariance's Cholesky factor.
func whitener(m Matrix, h, dim int, weights []float64) (mean []float32, whiten Matrix, err error) {
	mean = make([]float32, dim)
	for i, w := range weights {
		for j, x := range m.Head(i, h, dim) {
			mean[j] += float32(w) * x
		}
	}
	cov := mat.NewSymDense(dim, nil)
	centred := mat.NewVecDense(dim, nil)
	for i, w := range weights {
		if w == 0 {
			continue
		}
		for j, x := range m.Head(i, h, dim) {
			centred.SetVec(j, float64(x-mean[j]))
		}
		cov.SymRankOne(cov, w, centred)
	}
	for j, extra := 0, ridge*mat.Trace(cov)/float64(dim); j < dim; j++ {
		cov.SetSym(j, j, cov.At(j, j)+extra)
	}
	var c mat.Cholesky
	if !c.Factorize(cov) {
		return nil, Matrix{}, &Skip{"the covariance of a head cannot be inverted"}
	}
	var l, inverse mat.TriDense
	c.LTo(&l)
	if err := inverse.InverseTri(&l); err != nil {
		return nil, Matrix{}, &Skip{"the covariance of a head cannot be inverted"}
	}
	var d mat.Dense
	d.CloneFrom(&inverse)
	return mean, single(&d), nil
}
