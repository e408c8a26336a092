package slotfile

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/kvshield/kvshield/audit"
)

// sortRows brings the rows of a snapshot into the order of their positions, of which no two may be equal. The snapshot must have
// passed its own Check.
func sortRows(s *audit.Snapshot) error {
	order := make([]int, len(s.Positions))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(s.Positions[a], s.Positions[b]) })
	positions := make([]int32, len(order))
	for i, from := range order {
		positions[i] = s.Positions[from]
		if i > 0 && positions[i] == positions[i-1] {
			return fmt.Errorf("two cells have position %d", positions[i])
		}
	}
	if slices.IsSorted(s.Positions) {
		return nil
	}
	s.Positions = positions
	for i, l := range s.Layers {
		s.Layers[i] = audit.Layer{K: inOrder(l.K, order), V: inOrder(l.V, order)}
	}
	return nil
}

// inOrder is the matrix whose row i is row order[i] of m.
func inOrder(m audit.Matrix, order []int) audit.Matrix {
	out := audit.NewMatrix(m.Rows, m.Cols)
	for i, from := range order {
		copy(out.Row(i), m.Row(from))
	}
	return out
}
