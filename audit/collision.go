package audit

import (
	"context"
	"fmt"
	"math"
	"time"
)

const (
	collisionTokens = 48   // of the snapshot that are attacked, from its start
	collisionTries  = 1024 // candidates for one token
	// collides is the relative distance below which a candidate is taken at once, mayCollide that below which the best one is, if
	// it is half as far as the next.
	collides, mayCollide = 0.01, 0.05
)

// collision tries tokens one after the other, the likeliest first: it lets the public model run over what it has recovered and
// one candidate, and compares what that caches in a middle layer with the snapshot. A permutation does not help:
// sorted, the rows compare as well (vocabulary matching: arXiv 2505.18332, section 4; collision attack: arXiv 2508.09442, section 4).
var collision = Attack{
	Key: "collision", Title: "try tokens, compare a middle layer", Attacker: A2, Engine: true,
	Run: func(ctx context.Context, e *Evidence) (*Guess, error) {
		if e.Engine == nil {
			return nil, &Skip{"there is no engine to try tokens with"}
		}
		layer := len(e.Snapshot.Layers) / 2
		c := collider{e, layer, time.Now().Add(e.Time)}
		g := &Guess{Tokens: make([]int32, e.Snapshot.Tokens()), Tried: min(collisionTokens, e.Snapshot.Tokens()), Where: fmt.Sprintf("keys and values of layer %d", layer)}
		for i := range g.Tokens {
			g.Tokens[i] = -1
		}
		next := e.Public.first()
		for i := range g.Tried {
			token, after, err := c.find(ctx, g.Tokens[:i], next)
			if err != nil {
				return nil, err
			}
			if token < 0 {
				if time.Now().After(c.end) {
					g.Where += fmt.Sprintf(", %d tokens until time ran out", i)
				}
				break
			}
			g.Tokens[i], next = token, e.Public.rest(after)
		}
		return g, nil
	},
}

// first are the candidates for a conversation's first token.
func (p *Public) first() []int32 {
	if p.Start < 0 {
		return p.rest(nil)
	}
	return p.rest([]int32{p.Start})
}

// rest appends to the likely tokens the ones that are frequent in general.
func (p *Public) rest(likely []int32) []int32 {
	out := append([]int32(nil), likely...)
	seen := map[int32]bool{}
	for _, t := range likely {
		seen[t] = true
	}
	for _, t := range p.byPrior() {
		if len(out) >= collisionTries {
			break
		}
		if !seen[int32(t)] {
			out = append(out, int32(t))
		}
	}
	return out
}

func (p *Public) byPrior() []int {
	p.once.Do(func() { p.ranked = ranked(len(p.Prior), func(t int) float64 { return p.Prior[t] }) })
	return p.ranked
}

type collider struct {
	*Evidence
	layer int
	end   time.Time
}

// find returns the token that follows the prefix, -1 when no candidate collides, and what may come after it.
func (c *collider) find(ctx context.Context, prefix, candidates []int32) (int32, []int32, error) {
	best, second, token := math.Inf(1), math.Inf(1), int32(-1)
	var after []int32
	for _, t := range candidates {
		if time.Now().After(c.end) {
			return -1, nil, ctx.Err()
		}
		step, err := c.Engine.Extend(ctx, prefix, t)
		if err != nil {
			return -1, nil, err
		}
		d := c.away(step, len(prefix))
		if d < best {
			best, second, token, after = d, best, t, step.Next
		} else {
			second = min(second, d)
		}
		if best < collides {
			return token, after, nil
		}
	}
	if best < mayCollide && best < second/2 {
		return token, after, nil
	}
	return -1, nil, nil
}

// away is how far the candidate's rows are from the snapshot's row i, as they are or, if that is nearer, without regard to
// permutations.
func (c *collider) away(s *Step, i int) float64 {
	mine, theirs := s.Layers[c.layer], c.Snapshot.Layers[c.layer]
	rows := Layer{Matrix{1, theirs.K.Cols, theirs.K.Row(i)}, Matrix{1, theirs.V.Cols, theirs.V.Row(i)}}
	return min(relative(mine.V, rows.V), relative(c.invariant(mine), c.invariant(rows)))
}

func (c *collider) invariant(l Layer) Matrix {
	cols, sorted := sortedSum(c.Public.HeadsKV)
	v := mapRows(l.V, cols(l.V.Cols), sorted)
	return beside(v, sortedMagnitudes(c.Public.Rotary, c.Public.HeadsKV, l.K))
}

func relative(a, b Matrix) float64 {
	size := norm(b.Data)
	if size == 0 {
		return math.Inf(1)
	}
	return float64(distance(a.Data, b.Data) / size)
}
