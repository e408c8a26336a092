package vault

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/shield"
	"github.com/kvshield/kvshield/internal/gguf"
)

const (
	splitTensors = "split.tensors.count"
	// largeModel is from what size in bytes on a file's unchanged tensors are worth being mapped in huge pages, which takes
	// up to one of them as padding. Measured: with small pages a 1.1B model decodes 15 to 20 % slower.
	largeModel = 64 << 20
)

// layout is where things are in one file of the shielded model.
type layout struct {
	source  shield.File
	tensors []gguf.Tensor
	patch   map[string]uint64
	end     int64 // of the data copied or permuted, from the start of the data
	size    int64 // of all data, from the start of the data
	data    int64 // where the data starts in the output; known once the header is written
}

// span is a range of bytes, from the start of the data.
type span struct{ from, to int64 }

// layOut plans the files of a shielded model. A marker that the model lacks goes behind the last
// tensor of its file, so that everything before it keeps its distance from the start of the data.
func layOut(plan *shield.Plan, files []shield.File) ([]*layout, *gguf.Tensor, error) {
	list := make([]*layout, len(files))
	total := uint64(0)
	for i, f := range files {
		data := f.Size - f.DataOffset
		list[i] = &layout{source: f, tensors: f.Tensors, end: data, size: data}
		total += uint64(len(f.Tensors))
	}
	marker := plan.Marker.Tensor
	if marker.Size > 0 {
		return list, &marker, nil
	}
	for _, l := range list {
		if _, found, _ := l.source.Uint(splitTensors); found {
			l.patch = map[string]uint64{splitTensors: total + 1}
		}
	}
	added, err := list[plan.Marker.File].add(marker)
	return list, added, err
}

// add appends a tensor and returns it as it was placed.
func (l *layout) add(t gguf.Tensor) (*gguf.Tensor, error) {
	l.end = 0
	if n := len(l.tensors); n > 0 {
		l.end = l.tensors[n-1].Offset + l.tensors[n-1].Size
	}
	l.tensors = append(slices.Clone(l.tensors), t)
	var err error
	if l.size, err = gguf.Place(l.tensors, l.source.Alignment); err != nil {
		return nil, enclave.Invalid("%s: %v", l.source.Name, err)
	}
	return &l.tensors[len(l.tensors)-1], nil
}

// writeHeader also gives the output its final size, so that a write never has to extend it.
func (l *layout) writeHeader(out *os.File) error {
	var err error
	page := int64(gguf.PageMax)
	if l.source.Size >= largeModel {
		page = gguf.HugePage
	}
	l.data, err = gguf.WriteHeaderInPlace(out, l.source.Data, l.source.File, l.tensors, l.patch, page)
	if bad, ok := errors.AsType[*gguf.Error](err); ok {
		return enclave.Invalid("%s: %v", l.source.Name, bad)
	}
	if err == nil {
		err = out.Truncate(l.data + l.size)
	}
	if err != nil {
		return fmt.Errorf("the header of the shielded model cannot be written: %w", withoutPath(err))
	}
	return nil
}

// copies lists what lies between the spans that the enclave writes.
func (l *layout) copies(file int, written []span) []enclave.Copy {
	var list []enclave.Copy
	slices.SortFunc(written, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	at := int64(0)
	for _, s := range append(written, span{l.end, l.end}) {
		if s.from > at {
			list = append(list, enclave.Copy{File: file, From: l.source.DataOffset + at, To: l.data + at, Length: s.from - at})
		}
		at = max(at, s.to)
	}
	return list
}
