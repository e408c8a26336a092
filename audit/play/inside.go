package play

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/audit/element"
	"github.com/kvshield/kvshield/audit/live"
	"github.com/kvshield/kvshield/audit/memory"
	"github.com/kvshield/kvshield/audit/slotfile"
)

// inside reads the running engine: its cache tensors, layer 0's weights and compute buffers through the hook, and all memory of its
// process, in which it looks for layer-0 values.
func (p *player) inside(ctx context.Context, c *client, shield Shield, f *slotfile.File, e *evidence) error {
	done := p.Progress(fmt.Sprintf("mode %s: reading the engine's cache and buffers", e.mode))
	d, err := dump(ctx, c, shield, e.truth)
	done()
	if err != nil {
		return err
	}
	s, err := d.Snapshot(p.shape.Layers, p.shape.HeadsKV)
	if err != nil {
		return err
	}
	for _, l := range s.Layers {
		unrotate(l.K, f.RotatedK)
		unrotate(l.V, f.RotatedV)
	}
	s = s.First(min(s.Tokens(), len(e.truth)))
	if p.shape.Sliding == nil {
		e.snapshots = append(e.snapshots, s)
	} else {
		e.snapshots = []*audit.Snapshot{s}
	}
	if bytes, zero := d.Zero(); zero {
		e.clear = append(e.clear, fmt.Sprintf("the live cache is %d bytes of zeros: the attacks were run on zeros", bytes))
	}
	e.weights = dumpedWeights(d, p.shape)
	after, err := p.afterPrompt(ctx, c, shield, e)
	if err != nil {
		return err
	}
	defer p.Progress(fmt.Sprintf("mode %s: scanning compute buffers and the process's memory", e.mode))()
	return p.scan(ctx, c, after, e)
}

// promptTokens is how long a prompt is whose traces in the compute buffers are looked for: one batch of the engine's default.
const promptTokens = 512

// afterPrompt dumps what the graph of a prompt leaves in the engine's buffers.
func (p *player) afterPrompt(ctx context.Context, c *client, shield Shield, e *evidence) (*live.Dump, error) {
	prompt := e.truth[:min(promptTokens, len(e.truth))]
	if _, err := c.complete(ctx, prompt, 1, map[string]any{"cache_prompt": false}); err != nil {
		return nil, err
	}
	d, err := dump(ctx, c, shield, prompt)
	if err != nil {
		return nil, err
	}
	used, all := 0, 0
	for _, b := range d.Buffers {
		all += len(b.Data)
		for _, v := range b.Data {
			if v != 0 {
				used++
			}
		}
	}
	e.clear = append(e.clear, fmt.Sprintf("after a prompt of %d tokens %d of %d bytes of the compute buffers are not zero", len(prompt), used, all))
	return d, nil
}

func unrotate(m audit.Matrix, block int) {
	if block > 0 {
		element.Unrotate(m.Data, block)
	}
}

// dump has the hook dump before the next graph, and asks for one more token until there was one.
func dump(ctx context.Context, c *client, shield Shield, said []int32) (*live.Dump, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		dump *live.Dump
		err  error
	}
	answered := make(chan answer, 1)
	go func() {
		file, err := shield.Dump(ctx, c.server.PID())
		if err != nil {
			answered <- answer{nil, err}
			return
		}
		defer file.Close()
		d, err := live.Read(file)
		answered <- answer{d, err}
	}()
	for {
		if _, err := c.complete(ctx, said, 1, nil); err != nil {
			return nil, err
		}
		select {
		case a := <-answered:
			return a.dump, a.err
		default:
		}
	}
}

// minRun is the shortest run of rows in memory that is taken for a piece of a conversation.
const minRun = 8

// scan looks for layer-0 values in compute buffers and in all memory of the engine's process.
func (p *player) scan(ctx context.Context, c *client, d *live.Dump, e *evidence) error {
	s := memory.NewScanner(p.public.V)
	var hits []memory.Hit
	for _, b := range d.Buffers {
		if err := s.Scan(ctx, bytes.NewReader(b.Data), 0, uint64(len(b.Data)), func(h memory.Hit) { hits = append(hits, h) }); err != nil {
			return err
		}
	}
	e.scans = append(e.scans, scanned{audit.Compute, s.Runs(hits)})
	hits, err := s.Process(ctx, c.server.PID())
	if err != nil {
		return err
	}
	e.scans = append(e.scans, scanned{audit.Memory, s.Runs(hits)})
	return nil
}

// scanned is what was found in one kind of memory.
type scanned struct {
	source audit.Source
	runs   []memory.Run
}

const scanAttack = "memory-scan"

// result scores runs of tokens, which come without a place in the conversation: each is laid where it fits best, and counts if
// at least half of it does.
func (s *scanned) result(e *evidence) (*audit.Result, []int32) {
	r := &audit.Result{Attack: scanAttack, Title: "layer-0 values, found without knowing where they lie", Attacker: string(audit.A1), Source: s.source, Tokens: len(e.truth)}
	guess, where := s.lay(e.truth)
	hits := 0
	for i, t := range guess {
		if t == e.truth[i] {
			hits++
		}
	}
	r.Rate = float64(hits) / float64(max(len(e.truth), 1))
	r.Where = where
	return r, guess
}

// lay places the runs in a conversation, and says where the longest was found.
func (s *scanned) lay(truth []int32) (guess []int32, where string) {
	guess = slices.Repeat([]int32{-1}, len(truth))
	where = "no run of values was found"
	longest := 0
	for _, run := range s.runs {
		if len(run.Tokens) < minRun {
			break
		}
		at, fits := place(run.Tokens, truth)
		if 2*fits < len(run.Tokens) {
			continue
		}
		if longest < len(run.Tokens) {
			longest = len(run.Tokens)
			where = fmt.Sprintf("%d rows of %s in a row at %#x", len(run.Tokens), run.Type, run.Address)
		}
		for i, t := range run.Tokens {
			if j := at + i; j >= 0 && j < len(guess) && t >= 0 && guess[j] != truth[j] {
				guess[j] = t
			}
		}
	}
	return guess, where
}

// place is where in the truth most tokens of a run are right.
func place(run, truth []int32) (at, fits int) {
	for shift := -len(run) + 1; shift < len(truth); shift++ {
		n := 0
		for i := max(0, -shift); i < len(run) && i+shift < len(truth); i++ {
			if run[i] == truth[i+shift] {
				n++
			}
		}
		if n > fits {
			at, fits = shift, n
		}
	}
	return at, fits
}
