package play

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/audit/slotfile"
	"github.com/kvshield/kvshield/internal/gguf"
)

const (
	dictionaryChunk = 2048 // tokens that the one-layer engine is asked at once
	rotaryTokens    = 4    // tokens whose keys are looked at over all positions
	rotarySpan      = 1024 // positions
)

// oneLayer writes a copy of the model that ends after its first layer: all that a dictionary of layer-0 rows needs. The engine
// itself then is the library that knows every architecture and every quantisation.
func oneLayer(path string) (*os.File, error) {
	src, f, err := gguf.Open(path)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	arch, _, err := f.Text("general.architecture")
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("kvshield-audit-layer", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot make a memory file for the model's first layer: %w", err)
	}
	out := os.NewFile(uintptr(fd), "first layer")
	if err := writeOneLayer(out, src, f, arch); err != nil {
		out.Close()
		return nil, fmt.Errorf("cannot copy the model's first layer: %w", err)
	}
	return out, nil
}

func writeOneLayer(out *os.File, src io.ReaderAt, f *gguf.File, arch string) error {
	var from, to []gguf.Tensor
	for _, t := range f.Tensors {
		if strings.HasPrefix(t.Name, "blk.") && !strings.HasPrefix(t.Name, "blk.0.") {
			continue
		}
		from = append(from, t)
	}
	to = append(to, from...)
	if _, err := gguf.Place(to, f.Alignment); err != nil {
		return err
	}
	patch := map[string]uint64{arch + ".block_count": 1}
	if _, stated, _ := f.Uint(arch + windowKey); stated {
		patch[arch+windowKey] = dictionaryChunk // what is cached does not depend on it, but how long it is kept does
	}
	start, err := gguf.WriteHeader(out, src, f, to, patch)
	if err != nil {
		return err
	}
	end := start
	for i, t := range to {
		w := io.NewOffsetWriter(out, start+t.Offset)
		if _, err := io.Copy(w, io.NewSectionReader(src, f.DataOffset+from[i].Offset, t.Size)); err != nil {
			return err
		}
		end = start + t.Offset + t.Size
	}
	// Engines want the padding behind the last tensor too.
	return out.Truncate((end + f.Alignment - 1) / f.Alignment * f.Alignment)
}

// dictionary asks a one-layer engine for the layer-0 rows of every token.
func (p *player) dictionary(ctx context.Context) (*audit.Public, error) {
	model, err := oneLayer(p.Model)
	if err != nil {
		return nil, err
	}
	defer model.Close()
	dir, err := p.scratch()
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	size := fmt.Sprint(dictionaryChunk)
	c, err := launch(ctx, llamacpp.ServerConfig{
		Program: p.Server, Model: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), model.Fd()), Env: os.Environ(),
		Args: append([]string{"-c", fmt.Sprint(dictionaryChunk + 64), "-b", size, "-ub", size, "-fa", "on"}, p.allOfIt()...),
	}, dir)
	if err != nil {
		return nil, fmt.Errorf("the engine does not run the model's first layer alone: %w", err)
	}
	defer c.close()
	public := &audit.Public{HeadsKV: p.shape.HeadsKV}
	shape := slotfile.Shape{Layers: 1, HeadsKV: p.shape.HeadsKV, Sliding: p.shape.Sliding}
	if public.Rotary, err = c.rotary(ctx, shape, p.vocabulary); err != nil {
		return nil, err
	}
	return public, c.rows(ctx, shape, p.vocabulary, public)
}

// layer0 are the rows that the engine caches for these tokens, at positions 0, 1, 2 and so on.
func (c *client) layer0(ctx context.Context, shape slotfile.Shape, tokens []int32) (*audit.Snapshot, error) {
	if _, err := c.complete(ctx, tokens, 0, map[string]any{"cache_prompt": false}); err != nil {
		return nil, err
	}
	f, err := c.slot(ctx, shape, 0)
	if err != nil {
		return nil, err
	}
	if f.Snapshot.Tokens() < len(tokens) {
		return nil, fmt.Errorf("the engine cached %d of %d tokens", f.Snapshot.Tokens(), len(tokens))
	}
	return f.Snapshot.First(len(tokens)), nil
}

func (c *client) rotary(ctx context.Context, shape slotfile.Shape, vocabulary int) (audit.Rotary, error) {
	var runs []audit.Matrix
	for i := range rotaryTokens {
		tokens := make([]int32, rotarySpan)
		for j := range tokens {
			tokens[j] = int32((2*i + 1) * vocabulary / (2 * rotaryTokens))
		}
		s, err := c.layer0(ctx, shape, tokens)
		if err != nil {
			return audit.Rotary{}, err
		}
		runs = append(runs, s.Layers[0].K)
	}
	return audit.MeasureRotary(runs, shape.HeadsKV), nil
}

func (c *client) rows(ctx context.Context, shape slotfile.Shape, vocabulary int, into *audit.Public) error {
	for first := 0; first < vocabulary; first += dictionaryChunk {
		tokens := make([]int32, min(dictionaryChunk, vocabulary-first))
		for i := range tokens {
			tokens[i] = int32(first + i)
		}
		s, err := c.layer0(ctx, shape, tokens)
		if err != nil {
			return err
		}
		if first == 0 {
			into.K, into.V = audit.NewMatrix(vocabulary, s.Layers[0].K.Cols), audit.NewMatrix(vocabulary, s.Layers[0].V.Cols)
		}
		keys := into.Rotary.Undone(s)
		for i := range tokens {
			copy(into.K.Row(first+i), keys.Row(i))
			copy(into.V.Row(first+i), s.Layers[0].V.Row(i))
		}
	}
	return nil
}
