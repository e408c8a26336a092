package play

import (
	"context"
	"fmt"
	"slices"

	"github.com/kvshield/kvshield/audit"
)

// curveLengths are the lengths at which recovery is plotted.
var curveLengths = []int{16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096}

func (p *player) attack(ctx context.Context, e *evidence, own *ownEngine) (*audit.Run, error) {
	run := &audit.Run{Mode: e.mode, TEE: e.tee, Tokens: len(e.truth), Truth: e.pieces, Chance: audit.Chance(e.truth), Clear: e.clear, Notes: append(e.notes, p.notes...)}
	var weights *audit.Weights
	if e.weights != nil {
		weights = &audit.Weights{PublicV: p.publicRows, ShieldedV: e.weights}
	}
	var err error
	for i, s := range e.snapshots {
		c := &audit.Case{Snapshot: s, Truth: e.truth, Public: p.public, Weights: weights, Engine: own, Other: e.other}
		for _, a := range p.attacks {
			if i > 0 && a.Engine {
				continue
			}
			result, err := p.one(ctx, e.mode, a, c, own.client)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", a.Key, err)
			}
			run.Results = append(run.Results, *result)
		}
		if i > 0 {
			continue
		}
		if run.Curves, err = p.curves(ctx, e.mode, c); err != nil {
			return nil, err
		}
	}
	return run, p.addScans(ctx, e, run, own.client)
}

// addScans are the results of looking through memory, unless other attacks were asked for.
func (p *player) addScans(ctx context.Context, e *evidence, run *audit.Run, own *client) error {
	if len(p.Attacks) > 0 && !slices.Contains(p.Attacks, scanAttack) {
		return nil
	}
	for i := range e.scans {
		r, guess := e.scans[i].result(e)
		texts, err := own.pieces(ctx, guess)
		if err != nil {
			return err
		}
		for j, text := range texts {
			r.Guess = append(r.Guess, audit.Piece{Text: text, Right: guess[j] == e.truth[j]})
		}
		run.Results = append(run.Results, *r)
	}
	return nil
}

func (p *player) one(ctx context.Context, mode string, a audit.Attack, c *audit.Case, own *client) (*audit.Result, error) {
	defer p.Progress(fmt.Sprintf("mode %s: %s, %s", mode, c.Snapshot.Source, a.Key))()
	o, err := audit.Evaluate(ctx, a, c)
	if err != nil {
		return nil, err
	}
	r := &audit.Result{Attack: a.Key, Title: a.Title, Attacker: string(a.Attacker), Source: c.Snapshot.Source, Known: a.Known, Skipped: o.Skipped}
	if o.Skipped != "" {
		return r, nil
	}
	r.Tokens, r.Rate, r.Figures, r.Where, r.Seconds = o.Score.Tokens, o.Score.Rate, o.Score.Figures, o.Guess.Where, o.Took.Seconds()
	r.Random, r.Other = rate(o.Random), rate(o.Other)
	r.Guess, err = guessed(ctx, own, o, a.Known)
	return r, err
}

func rate(r float64) *float64 {
	if r < 0 {
		return nil
	}
	return &r
}

func guessed(ctx context.Context, own *client, o *audit.Outcome, known int) ([]audit.Piece, error) {
	out := make([]audit.Piece, len(o.Score.Right))
	var tokens []int32
	if len(o.Guess.Tokens) > known {
		tokens = o.Guess.Tokens[known:min(len(o.Guess.Tokens), known+len(out))]
	}
	texts, err := own.pieces(ctx, tokens)
	if err != nil {
		return nil, err
	}
	for i := range out {
		out[i].Right = o.Score.Right[i]
		if i < len(texts) {
			out[i].Text = texts[i]
		}
	}
	return out, nil
}

func (p *player) curves(ctx context.Context, mode string, c *audit.Case) ([]audit.Curve, error) {
	defer p.Progress(fmt.Sprintf("mode %s: recovery against length", mode))()
	n := c.Snapshot.Tokens()
	lengths := []int{}
	for _, l := range curveLengths {
		if l < n {
			lengths = append(lengths, l)
		}
	}
	lengths = append(lengths, n)
	var out []audit.Curve
	for _, a := range p.attacks {
		if a.Engine || a.Known > 0 && !a.Grows {
			continue
		}
		points, err := audit.CurveOf(ctx, a, c, lengths)
		if err != nil {
			return nil, err
		}
		if len(points) > 0 {
			out = append(out, audit.Curve{Attack: a.Key, Title: a.Title, Points: points})
		}
	}
	return out, nil
}
