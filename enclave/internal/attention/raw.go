package attention

// row is a part of a cell in its page: n pieces of `size` bytes, `step` bytes apart.
type row struct{ at, n, size, step int }

var elementBytes = [...]int{F16: 2, F32: 4, Q8_0: 1}

// rows are the parts of one head's cell: key, value, and the scales of Q8_0.
func (p *place) rows(head int64) [4]row {
	kAt, vAt := p.panels(head)
	c, dimK, dimV, dimVP := int(p.cell%panelCells), int(p.dimK), int(p.dimV), int(p.dimVP)
	element := elementBytes[p.storage]
	r := [4]row{
		{int(kAt) + c*element, dimK, element, panelCells * element},
		{int(vAt) + c*dimVP*element, 1, dimV * element, 0},
	}
	if Storage(p.storage) == Q8_0 {
		k, v := q8Blocks(dimK), q8Blocks(dimV)
		r[2] = row{int(kAt) + dimK*panelCells + 2*c, k, 2, 2 * panelCells}
		r[3] = row{int(vAt) + dimVP*panelCells + 2*c*v, 1, 2 * v, 0}
	}
	return r
}

func (p *place) wipe(page []byte) {
	for h := range p.kvHeads {
		for _, r := range p.rows(h) {
			for i := range r.n {
				clear(page[r.at+i*r.step:][:r.size])
			}
		}
	}
}

func (p *place) export(page, raw []byte) {
	for h := range p.kvHeads {
		for _, r := range p.rows(h) {
			for i := range r.n {
				raw = raw[copy(raw, page[r.at+i*r.step:][:r.size]):]
			}
		}
	}
}

func (p *place) restore(page, raw []byte) {
	for h := range p.kvHeads {
		for _, r := range p.rows(h) {
			for i := range r.n {
				raw = raw[copy(page[r.at+i*r.step:][:r.size], raw):]
			}
		}
	}
}
