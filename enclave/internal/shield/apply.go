package shield

import "slices"

// Head says what stands at a head of a tensor of the shielded model: head number from of the true
// model, row rows[i] of it at row i. The table belongs to the permutation and must not be changed.
func (p *Permutation) Head(r Role, layer, head int) (from int, rows []uint16) {
	heads := p.layerHeads(layer)
	switch r {
	case Query, Sink, Gate, HeadGate:
		group := p.group(layer)
		from = int(heads[head/group])*group + head%group
		switch r {
		case Query:
			return from, p.rows
		case Gate:
			return from, p.valueRows(layer, head/group)
		}
		return from, []uint16{0}
	case Key:
		return int(heads[head]), p.rows
	case HeadNorm:
		return 0, p.rows
	}
	return int(heads[head]), p.valueRows(layer, head)
}

// Pairs returns what stands at each rotary place: twice the number of a pair of the true model, plus one where it is swapped.
func (p *Permutation) Pairs() []uint16 { return slices.Clone(p.pairs) }

// Factors returns the frequency factors of the shielded model. own are the model's factors, one for
// each rotary pair, or nil when it has none.
func (p *Permutation) Factors(own []float32) ([]float32, error) {
	return factors(p.pairs, p.shape.RotDim, p.shape.Base, own)
}

// group is how many query heads share a key/value head.
func (p *Permutation) group(layer int) int {
	n := p.shape.In(layer)
	return n.Heads / n.KV
}

// Inverse fills a table of RowOf(layer) entries that undoes the permutation on a row of a layer's
// attention output: true[i] = shielded[table[i]].
func (p *Permutation) Inverse(layer int, table []uint16) {
	heads, d := p.layerHeads(layer), p.shape.ValueDim
	group := p.group(layer)
	for h, from := range heads {
		for i, row := range p.valueRows(layer, h) {
			for g := range group {
				to := (int(from)*group+g)*d + int(row)
				table[to] = uint16((h*group+g)*d + i)
			}
		}
	}
}
