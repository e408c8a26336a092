package shield

import (
	"fmt"

	"github.com/kvshield/kvshield/enclave/internal/keys"
	"github.com/kvshield/kvshield/enclave/internal/secmem"
)

// Permutation is what one key does to a model. All tables say, for a place in the shielded model,
// what of the true model stands there. It may be read by many goroutines at once.
type Permutation struct {
	shape  Shape
	mem    *secmem.Region
	pairs  []uint16 // pairPlace, for every rotary pair
	rows   []uint16 // rows of a query or key head
	heads  []uint16 // key/value heads, layer after layer
	values []uint16 // rows of a value head, for every layer and head
}

// Draw makes the permutation that belongs to a root. Wipe it.
func Draw(s Shape, root *keys.Root) (*Permutation, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	sizes := []int{s.RotDim / 2, s.KeyDim, s.Layers * s.HeadsKV, s.Layers * s.HeadsKV * s.ValueDim}
	total := 0
	for _, n := range sizes {
		total += n
	}
	mem, err := secmem.New(2 * total)
	if err != nil {
		return nil, fmt.Errorf("no memory for the permutation: %w", err)
	}
	p := &Permutation{shape: s, mem: mem}
	words := mem.Uint16s()
	for i, table := range []*[]uint16{&p.pairs, &p.rows, &p.heads, &p.values} {
		*table, words = words[:sizes[i]], words[sizes[i]:]
	}
	if err := p.draw(root); err != nil {
		p.Wipe()
		return nil, err
	}
	return p, nil
}

// Wipe zeroes the permutation, which must not be used afterwards.
func (p *Permutation) Wipe() {
	p.pairs, p.rows, p.heads, p.values = nil, nil, nil, nil
	p.mem.Wipe()
}

func (p *Permutation) draw(root *keys.Root) error {
	if err := p.drawRows(root); err != nil {
		return err
	}
	for layer := range p.shape.Layers {
		if p.shape.FixedHeads {
			identity(p.layerHeads(layer))
		} else if err := shuffle(root, p.layerHeads(layer), "kvheads", "layer=%d", layer); err != nil {
			return err
		}
		for h := range p.shape.In(layer).KV {
			if err := shuffle(root, p.valueRows(layer, h), "v", "layer=%d/kvhead=%d", layer, h); err != nil {
				return err
			}
		}
	}
	return nil
}

// drawRows fills the row table of queries and keys: the rotated rows in pairs, the others singly.
func (p *Permutation) drawRows(root *keys.Root) error {
	if err := p.drawPairs(root); err != nil {
		return err
	}
	n := p.shape.RotDim
	for j, word := range p.pairs {
		place := pairPlace(word)
		a, b := p.shape.Rope.pair(j, n)
		first, second := p.shape.Rope.pair(place.pair(), n)
		if place.swapped() {
			first, second = second, first
		}
		p.rows[a], p.rows[b] = uint16(first), uint16(second)
	}
	rest := p.rows[n:]
	if err := shuffle(root, rest, "unrotated", "qk"); err != nil {
		return err
	}
	for i := range rest {
		rest[i] += uint16(n)
	}
	return nil
}

func (p *Permutation) drawPairs(root *keys.Root) error {
	if err := shuffle(root, p.pairs, "pairs", "qk"); err != nil {
		return err
	}
	s, err := root.Stream(info("swaps", "qk"))
	if err != nil {
		return err
	}
	defer s.Close()
	for j := range p.pairs {
		p.pairs[j] = p.pairs[j]<<1 | s.Bit()
	}
	return nil
}

// shuffle fills a table with a permutation of its indices, drawn for one purpose.
func shuffle(root *keys.Root, table []uint16, what, where string, a ...any) error {
	s, err := root.Stream(info(what, where, a...))
	if err != nil {
		return err
	}
	defer s.Close()
	identity(table)
	s.Shuffle(table)
	return nil
}

func identity(table []uint16) {
	for i := range table {
		table[i] = uint16(i)
	}
}

// info names a purpose for the key schedule, as in "kvshield/v1/permute/layer=3/kvhead=1/v".
func info(what, where string, a ...any) string {
	return "kvshield/v1/permute/" + fmt.Sprintf(where, a...) + "/" + what
}

func (p *Permutation) layerHeads(layer int) []uint16 {
	at := layer * p.shape.HeadsKV
	return p.heads[at : at+p.shape.In(layer).KV]
}

func (p *Permutation) valueRows(layer, head int) []uint16 {
	n := p.shape.ValueDim
	at := (layer*p.shape.HeadsKV + head) * n
	return p.values[at : at+n]
}
