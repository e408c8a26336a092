package vault

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync"

	"github.com/kvshield/kvshield/enclave/internal/shield"
)

const (
	// maxBuffer holds a head of the largest llama models in F16; two per worker.
	maxBuffer  = 4 << 20
	maxWorkers = 4
)

// permute writes the permuted tensors, several at a time.
func permute(ctx context.Context, plan *shield.Plan, p *shield.Permutation, files []*layout, out outputs) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	queue := make(chan shield.Target)
	var workers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), maxWorkers, len(plan.Targets)) {
		workers.Go(func() {
			w := newWorker(plan, p)
			for t := range queue {
				if err := w.tensor(ctx, t, files[t.File], out[t.File]); err != nil {
					stop(err)
				}
			}
		})
	}
	for _, t := range plan.Targets {
		queue <- t
	}
	close(queue)
	workers.Wait()
	return context.Cause(ctx)
}

// worker permutes one tensor at a time, head by head: the rows of a head lie together in source and
// output, so that reading and writing stay sequential.
type worker struct {
	shape       shield.Shape
	permutation *shield.Permutation
	read, write []byte
}

func newWorker(plan *shield.Plan, p *shield.Permutation) *worker {
	largest := int64(1)
	for _, t := range plan.Targets {
		_, rows := plan.Shape.HeadRows(t.Role, t.Layer)
		largest = max(largest, int64(rows)*t.RowBytes)
	}
	n := min(largest, maxBuffer)
	return &worker{plan.Shape, p, make([]byte, n), make([]byte, n)}
}

// tensor does nothing once ctx is done.
func (w *worker) tensor(ctx context.Context, t shield.Target, l *layout, out *os.File) error {
	heads, rows := w.shape.HeadRows(t.Role, t.Layer)
	size := int64(rows) * t.RowBytes
	for h := range heads {
		if ctx.Err() != nil {
			return nil
		}
		from, table := w.permutation.Head(t.Role, t.Layer, h)
		start := t.Tensor.Offset + t.First*t.RowBytes
		src := l.source.DataOffset + start + int64(from)*size
		dst := l.data + start + int64(h)*size
		permuteHead := w.head
		if size > int64(len(w.read)) {
			permuteHead = w.longHead
		}
		if err := permuteHead(l.source, src, out, dst, table, t.RowBytes); err != nil {
			return err
		}
	}
	return nil
}

func (w *worker) head(in shield.File, src int64, out *os.File, dst int64, table []uint16, row int64) error {
	size := int64(len(table)) * row
	if err := readAt(in, w.read[:size], src); err != nil {
		return err
	}
	for i, from := range table {
		copy(w.write[int64(i)*row:(int64(i)+1)*row], w.read[int64(from)*row:])
	}
	return writeAt(out, w.write[:size], dst)
}

// longHead is for a head that does not fit into the buffers.
func (w *worker) longHead(in shield.File, src int64, out *os.File, dst int64, table []uint16, row int64) error {
	for i, from := range table {
		for at := int64(0); at < row; at += int64(len(w.read)) {
			piece := w.read[:min(int64(len(w.read)), row-at)]
			if err := readAt(in, piece, src+int64(from)*row+at); err != nil {
				return err
			}
			if err := writeAt(out, piece, dst+int64(i)*row+at); err != nil {
				return err
			}
		}
	}
	return nil
}

func writeAt(out *os.File, b []byte, at int64) error {
	if _, err := out.WriteAt(b, at); err != nil {
		return fmt.Errorf("the shielded model cannot be written: %w", withoutPath(err))
	}
	return nil
}
