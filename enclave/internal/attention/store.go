package attention

import "math"

// A head's part of a page: where its panel of keys and of values begins.
func (p *place) panels(head int64) (k, v int64) {
	panel := p.cell / panelCells
	return p.kAt + head*p.kHead + panel*p.kPanel, p.vAt + head*p.vHead + panel*p.vPanel
}

// place is where a cell of the job's head lies.
func (j *job) place(cell int64) place {
	return place{dimK: j.dimK, dimV: j.dimV, dimVP: j.dimVP, kvHeads: 1, storage: j.storage, cell: cell,
		kAt: j.kAt, vAt: j.vAt, kPanel: j.kPanel, vPanel: j.vPanel}
}

// get reads a cell's keys and values of all heads.
func (p *place) get(page []byte, k, v []float32) {
	for h := range p.kvHeads {
		p.read(page, h, k[h*p.dimK:][:p.dimK], v[h*p.dimV:][:p.dimV])
	}
}

// read reads one head's key and value.
func (p *place) read(page []byte, head int64, k, v []float32) {
	kAt, vAt := p.panels(head)
	c, nk, nv := int(p.cell%panelCells), int(p.dimK)*panelCells, int(p.dimVP)*panelCells
	row := c * int(p.dimVP)
	switch Storage(p.storage) {
	case F32:
		keys, values := as[float32](page, kAt, nk), as[float32](page, vAt, nv)
		for d := range k {
			k[d] = keys[d*panelCells+c]
		}
		copy(v, values[row:])
	case F16:
		keys, values := as[uint16](page, kAt, nk), as[uint16](page, vAt, nv)
		for d := range k {
			k[d] = halfFloat(keys[d*panelCells+c])
		}
		for d := range v {
			v[d] = halfFloat(values[row+d])
		}
	case Q8_0:
		keys, values := as[int8](page, kAt, nk), as[int8](page, vAt, nv)
		kScales, vScales := p.scales(page, kAt, vAt)
		for d := range k {
			k[d] = float32(keys[d*panelCells+c]) * halfFloat(kScales[d/q8Block*panelCells+c])
		}
		blocks := q8Blocks(len(v))
		for d := range v {
			v[d] = float32(values[row+d]) * halfFloat(vScales[c*blocks+d/q8Block])
		}
	}
}

func (p *place) scales(page []byte, kAt, vAt int64) (k, v []uint16) {
	return as[uint16](page, kAt+p.dimK*panelCells, q8Blocks(int(p.dimK))*panelCells),
		as[uint16](page, vAt+p.dimVP*panelCells, q8Blocks(int(p.dimV))*panelCells)
}

// portablePut stores a cell's keys and values of all heads; false: a number is not finite in this storage.
func portablePut(p *place, k, v []float32, page []byte) bool {
	ok := true
	for h := range p.kvHeads {
		ok = p.write(page, h, k[h*p.dimK:][:p.dimK], v[h*p.dimV:][:p.dimV]) && ok
	}
	return ok
}

func (p *place) write(page []byte, head int64, k, v []float32) bool {
	kAt, vAt := p.panels(head)
	c, nk, nv := int(p.cell%panelCells), int(p.dimK)*panelCells, int(p.dimVP)*panelCells
	row := c * int(p.dimVP)
	switch Storage(p.storage) {
	case F32:
		return spread(as[float32](page, kAt, nk)[c:], panelCells, k, func(f float32) (float32, bool) { return f, finite(f) }) &&
			spread(as[float32](page, vAt, nv)[row:], 1, v, func(f float32) (float32, bool) { return f, finite(f) })
	case F16:
		return spread(as[uint16](page, kAt, nk)[c:], panelCells, k, half) &&
			spread(as[uint16](page, vAt, nv)[row:], 1, v, half)
	}
	kScales, vScales := p.scales(page, kAt, vAt)
	return quantise(as[int8](page, kAt, nk)[c:], kScales[c:], panelCells, k) &&
		quantise(as[int8](page, vAt, nv)[row:], vScales[c*q8Blocks(len(v)):], 1, v)
}

func half(f float32) (uint16, bool) {
	h := halfBits(f)
	return h, halfFinite(h)
}

func spread[T any](to []T, step int, from []float32, convert func(float32) (T, bool)) bool {
	ok := true
	for i, f := range from {
		var fine bool
		to[i*step], fine = convert(f)
		ok = ok && fine
	}
	return ok
}

// quantise is ggml's Q8_0: the largest value of a block becomes ±127. Elements and scales are `step` apart.
func quantise(to []int8, scales []uint16, step int, from []float32) bool {
	ok := true
	for b := 0; b*q8Block < len(from); b++ {
		block := from[b*q8Block : min(len(from), (b+1)*q8Block)]
		var top float32
		for _, f := range block {
			ok = ok && finite(f)
			top = max(top, float32(math.Abs(float64(f))))
		}
		scale := top / 127
		inverse := 1 / scale
		if !ok || !finite(inverse) {
			inverse = 0
		}
		h := halfBits(scale)
		ok = ok && halfFinite(h)
		scales[b*step] = h
		for i, f := range block {
			var q float32
			if ok {
				q = f * inverse
			}
			to[(b*q8Block+i)*step] = int8(math.Round(float64(q)))
		}
	}
	return ok
}
