package play

import (
	"context"
	"fmt"
	"slices"

	"github.com/kvshield/kvshield/audit"
)

// lengths at which recovery is plotted: fewer where the vocabulary makes an attack long.
func (p *player) lengths(tokens int) []int {
	const largeVocabulary = 20_000
	factor := 2
	if p.vocabulary > largeVocabulary {
		factor = 4
	}
	var out []int
	for n := 16; n < tokens; n *= factor {
		out = append(out, n)
	}
	return append(out, tokens)
}

func (p *player) attack(ctx context.Context, e *evidence, own *ownEngine) (*audit.Run, error) {
	run := &audit.Run{Mode: e.mode, TEE: e.tee, Tokens: len(e.truth), Truth: e.pieces, Chance: audit.Chance(e.truth), Clear: e.clear, Notes: append(e.notes, p.notes...)}
	var weights *audit.Weights
	if e.weights != nil {
		weights = &audit.Weights{PublicV: p.publicRows, ShieldedV: e.weights}
	}
	for i, s := range e.snapshots {
		if i > 0 && same(s, e.snapshots[0]) {
			repeat(run, s.Source)
			continue
		}
		c := &audit.Case{Snapshot: s, Truth: e.truth, Public: p.public, Weights: weights, Engine: own, Other: e.other}
		for _, a := range p.attacks {
			if i > 0 && a.Engine {
				continue
			}
			if err := p.one(ctx, run, a, c, own.client, i == 0); err != nil {
				return nil, fmt.Errorf("%s: %w", a.Key, err)
			}
		}
	}
	return run, p.addScans(ctx, e, run, own.client)
}

// same says that two snapshots hold the same numbers.
func same(a, b *audit.Snapshot) bool {
	if a.Tokens() != b.Tokens() || len(a.Layers) != len(b.Layers) {
		return false
	}
	for i := range a.Layers {
		if !slices.Equal(a.Layers[i].K.Data, b.Layers[i].K.Data) || !slices.Equal(a.Layers[i].V.Data, b.Layers[i].V.Data) {
			return false
		}
	}
	return true
}

// repeat says of a source with the same numbers what was found in the first.
func repeat(run *audit.Run, source audit.Source) {
	for _, r := range run.Results {
		r.Source = source
		run.Results = append(run.Results, r)
	}
	run.Notes = append(run.Notes, fmt.Sprintf("the %s holds number for number what the slot file holds: its results are the same", source))
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

// one runs an attack and adds its result, and its curve, to the run.
func (p *player) one(ctx context.Context, run *audit.Run, a audit.Attack, c *audit.Case, own *client, curve bool) error {
	defer p.Progress(fmt.Sprintf("mode %s: %s, %s", run.Mode, c.Snapshot.Source, a.Key))()
	o, err := audit.Evaluate(ctx, a, c)
	if err != nil {
		return err
	}
	r := audit.Result{Attack: a.Key, Title: a.Title, Attacker: string(a.Attacker), Source: c.Snapshot.Source, Known: a.Known, Skipped: o.Skipped}
	if o.Skipped == "" {
		r.Tokens, r.Rate, r.Figures, r.Where, r.Seconds = o.Score.Tokens, o.Score.Rate, o.Score.Figures, o.Guess.Where, o.Took.Seconds()
		r.Random, r.Other = rate(o.Random), rate(o.Other)
		if r.Guess, err = guessed(ctx, own, o, a.Known); err != nil {
			return err
		}
	}
	run.Results = append(run.Results, r)
	if o.Skipped != "" || !curve || a.Engine || a.Known > 0 && !a.Grows {
		return nil
	}
	points, err := audit.Curve(ctx, o, c, p.lengths(c.Snapshot.Tokens()))
	run.Curves = append(run.Curves, audit.Line{Attack: a.Key, Title: a.Title, Points: points})
	return err
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
