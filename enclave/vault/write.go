package vault

import (
	"context"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/shield"
	"github.com/kvshield/kvshield/internal/gguf"
)

// write fills the outputs and says what is left to copy.
func write(ctx context.Context, plan *shield.Plan, d *drawn, in *sources, out outputs) (enclave.LoadResult, error) {
	res := enclave.LoadResult{Model: plan.Model, Fingerprint: []byte(d.print), Marker: plan.Marker.Tensor.Name, Pairs: d.pairs, FixedHeads: plan.Shape.FixedHeads}
	files, marker, err := layOut(plan, in.files)
	if err != nil {
		return res, err
	}
	for i, l := range files {
		if err := l.writeHeader(out[i]); err != nil {
			return res, err
		}
		res.OutputSizes = append(res.OutputSizes, l.data+l.size)
		res.Copies = append(res.Copies, l.copies(i, written(plan, i, marker))...)
	}
	at := plan.Marker.File
	if err := writeAt(out[at], d.marker, files[at].data+marker.Offset); err != nil {
		return res, err
	}
	if err := permute(ctx, plan, d.permutation, files, out); err != nil {
		return res, err
	}
	return res, in.unchanged()
}

// written lists the spans of a file that do not come from its source unchanged. A marker that was
// added lies behind all that is copied.
func written(plan *shield.Plan, file int, marker *gguf.Tensor) []span {
	var list []span
	for _, t := range plan.Targets {
		if t.File == file {
			list = append(list, span{t.Tensor.Offset, t.Tensor.Offset + t.Tensor.Size})
		}
	}
	if plan.Marker.File == file && plan.Marker.Tensor.Size > 0 {
		list = append(list, span{marker.Offset, marker.Offset + marker.Size})
	}
	return list
}
