package attention

import (
	"encoding/binary"
	"math"
)

// portable is the kernel in Go: for machines without the instructions and builds without C, and what the others are tested
// against. It works cell by cell, and is about 60 times slower than AVX-512.
var portable = kernel{name: "portable", item: portableItem, finish: portableFinish, put: portablePut}

// portableItem lays its scratch memory out for itself: scaled queries, one key, one value.
func portableItem(j *job, r *run, scratch, part []float32) bool {
	rows, dk, dv := int(j.tokens*j.group), int(j.dimK), int(j.dimV)
	q, key, value := scratch[:rows*dk], scratch[rows*dk:][:dk], scratch[rows*dk+dk:][:dv]
	padded := roundUp(int(j.rowsMax), lane)
	tops, sums, out := part[:rows], part[padded:][:rows], part[2*padded:]
	for i := range tops {
		tops[i], sums[i] = float32(math.Inf(-1)), 0
	}
	clear(out)
	if !j.pack(q, r.q) {
		return false
	}
	for panel := j.panelLo; panel < j.panelHi; panel++ {
		for c := range int64(panelCells) {
			cell := panel*panelCells + c
			if !r.anySees(j, cell) {
				continue
			}
			at := j.place(cell % pageCells)
			at.read(r.c.pages[cell/pageCells].mem, 0, key, value)
			for row := range rows {
				j.add(r, row, cell, dot(q[row*dk:][:dk], key), value, &tops[row], &sums[row], out[row*int(j.dimVP):][:dv])
			}
		}
	}
	return true
}

// pack gathers the rows' queries, scaled; false: one is not finite.
func (j *job) pack(to, q []float32) bool {
	scale := j.scale
	if j.softcap != 0 {
		scale /= j.softcap
	}
	n := int(j.group * j.dimK)
	ok := true
	for t := range int(j.tokens) {
		from := q[((int(j.first)+t)*int(j.queryHeads)+int(j.head*j.group))*int(j.dimK):][:n]
		for i, x := range from {
			ok = ok && finite(x)
			to[t*n+i] = x * scale
		}
	}
	return ok
}

// add takes one logit into a row's running softmax.
func (j *job) add(r *run, row int, cell int64, s float32, value []float32, top, sum *float32, out []float32) {
	token := j.first + int64(row)/j.group
	if !r.vis.shows(token, cell) {
		return
	}
	if j.softcap != 0 {
		s = j.softcap * float32(math.Tanh(float64(s)))
	}
	s += r.slopes[j.head*j.group+int64(row)%j.group] * r.mask.at(token, cell)
	weight, keep := float32(1), float32(1)
	if s > *top {
		keep, *top = exp(*top-s), s
	} else {
		*top = max(*top, -math.MaxFloat32) // it saw something, even if no logit that a float can hold
		weight = exp(s - *top)
	}
	*sum = *sum*keep + weight
	for d, x := range value {
		out[d] = out[d]*keep + weight*x
	}
}

func portableFinish(j *job, r *run, parts []float32, splits, stride int) bool {
	ok := true
	for row := range int(j.tokens * j.group) {
		head := int(j.head*j.group) + row%int(j.group)
		token := int(j.first) + row/int(j.group)
		out := r.out[(token*int(j.queryHeads)+head)*int(j.dimV):][:j.dimV]
		top := float32(math.Inf(-1))
		if r.params.Sinks != nil {
			top = r.params.Sinks[head]
		}
		ok = j.merge(out, parts, splits, stride, row, top, r.params.Sinks != nil) && ok
	}
	return ok
}

// merge joins a row's partial results. top is the sink's logit, or -infinity.
func (j *job) merge(out, parts []float32, splits, stride, row int, top float32, sink bool) bool {
	padded := roundUp(int(j.rowsMax), lane)
	first := top
	for s := range splits {
		top = max(top, parts[s*stride+row])
	}
	var sum float32
	if sink {
		sum = exp(first - top)
	}
	clear(out)
	for s := range splits {
		part := parts[s*stride:]
		if math.IsInf(float64(part[row]), -1) {
			continue
		}
		share := exp(part[row] - top)
		sum += part[padded+row] * share
		for d := range out {
			out[d] += part[2*padded+row*int(j.dimVP)+d] * share
		}
	}
	if sum == 0 {
		return math.IsInf(float64(top), -1)
	}
	ok := finite(sum)
	for d := range out {
		out[d] /= sum
		ok = ok && finite(out[d])
	}
	return ok
}

func (r *run) anySees(j *job, cell int64) bool {
	for t := range j.tokens {
		if r.vis.shows(j.first+t, cell) {
			return true
		}
	}
	return false
}

func (v *visibility) shows(token, cell int64) bool {
	return v.rows[int(token)*v.stride+int(cell/panelCells)]>>(cell%panelCells)&1 != 0
}

func (m *Mask) at(token, cell int64) float32 {
	i := token*int64(m.Cells) + cell
	switch m.Type {
	case MaskF16:
		return halfFloat(binary.LittleEndian.Uint16(m.Data[i*2:]))
	case MaskF32:
		return math.Float32frombits(binary.LittleEndian.Uint32(m.Data[i*4:]))
	}
	return 0
}

func exp(x float32) float32 { return float32(math.Exp(float64(x))) }

// dot has four sums, so that an addition need not wait for the one before.
func dot(a, b []float32) float32 {
	var s0, s1, s2, s3 float32
	for len(a) >= 4 && len(b) >= 4 {
		s0 += a[0] * b[0]
		s1 += a[1] * b[1]
		s2 += a[2] * b[2]
		s3 += a[3] * b[3]
		a, b = a[4:], b[4:]
	}
	for i := range a {
		s0 += a[i] * b[i]
	}
	return s0 + s1 + (s2 + s3)
}
