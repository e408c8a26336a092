package audit

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"time"
)

// Case is a snapshot with all that attacks on it need, and the truth, which they do not see.
type Case struct {
	Snapshot *Snapshot
	Truth    []int32
	Public   *Public
	Weights  *Weights
	Engine   Engine
	// Other is the snapshot of another conversation in the same run, under the same keys: a control.
	Other *Snapshot
}

// Outcome of one attack on a case.
type Outcome struct {
	Attack  Attack
	Skipped string
	Score   Score
	Guess   *Guess
	// Random and Other are the rates on the controls, negative when they were not run.
	Random, Other float64
	Took          time.Duration
}

// Evaluate runs one attack on a case and on its controls. An attack with nothing to work on is skipped, which is no error.
func Evaluate(ctx context.Context, a Attack, c *Case) (*Outcome, error) {
	began := time.Now()
	o := &Outcome{Attack: a, Random: -1, Other: -1}
	guess, err := c.attack(ctx, a, c.Snapshot, engineTime)
	var skip *Skip
	if errors.As(err, &skip) {
		o.Skipped = skip.Reason
		return o, nil
	}
	if err != nil {
		return nil, err
	}
	o.Guess, o.Score, o.Took = guess, ScoreOf(guess, c.Truth, a.Known), time.Since(began)
	if o.Random, err = c.control(ctx, a, noiseLike(c.Snapshot)); err != nil {
		return nil, err
	}
	o.Other, err = c.control(ctx, a, c.Other)
	return o, err
}

// attack runs on a snapshot of the case's conversation, or on a control, which gets the same known tokens.
func (c *Case) attack(ctx context.Context, a Attack, s *Snapshot, limit time.Duration) (*Guess, error) {
	if a.Known >= len(c.Truth) || a.Known >= s.Tokens() {
		return nil, &Skip{"the conversation has no tokens beyond those to know"}
	}
	e := &Evidence{Snapshot: s, Public: c.Public, Known: c.Truth[:a.Known:a.Known], Engine: c.Engine, Time: limit}
	if a.Attacker == A3 || a.Attacker == A4 {
		e.Weights = c.Weights
	}
	g, err := a.Run(ctx, e)
	if errors.Is(err, errNothing) {
		return &Guess{Tokens: []int32{}, Where: "nothing cached"}, nil
	}
	return g, err
}

// How long an attack may run its engine, on the conversation's cache and on a control.
const engineTime, controlTime = 30 * time.Second, 10 * time.Second

// controlTokens is the length at which controls are run: chance does not depend on it.
const controlTokens = 512

func (c *Case) control(ctx context.Context, a Attack, s *Snapshot) (float64, error) {
	if s == nil || s.Tokens() == 0 {
		return -1, nil
	}
	n := min(s.Tokens(), len(c.Truth), max(controlTokens, 2*a.Known))
	g, err := c.attack(ctx, a, s.First(n), controlTime)
	var skip *Skip
	if errors.As(err, &skip) {
		return -1, nil
	}
	if err != nil {
		return 0, err
	}
	return ScoreOf(g, c.Truth[:n], a.Known).Rate, nil
}

// noiseLike is a snapshot of normal noise with the mean and deviation that each layer of s has.
func noiseLike(s *Snapshot) *Snapshot {
	r := rand.New(rand.NewPCG(3, 4))
	out := *s
	out.Layers = make([]Layer, len(s.Layers))
	for i, l := range s.Layers {
		out.Layers[i] = Layer{noise(r, l.K), noise(r, l.V)}
	}
	return &out
}

func noise(r *rand.Rand, like Matrix) Matrix {
	var sum, squares float64
	for _, v := range like.Data {
		sum += float64(v)
		squares += float64(v) * float64(v)
	}
	n := float64(max(len(like.Data), 1))
	mean := sum / n
	deviation := math.Sqrt(max(squares/n-mean*mean, 0))
	out := NewMatrix(like.Rows, like.Cols)
	for i := range out.Data {
		out.Data[i] = float32(mean + deviation*r.NormFloat64())
	}
	return out
}

// Curve is how much an attack recovers of the first tokens, for each of the lengths. An attack that does not get better with a
// longer snapshot is not run again: o is what it recovered of the whole.
func Curve(ctx context.Context, o *Outcome, c *Case, lengths []int) ([]Point, error) {
	var points []Point
	for _, n := range lengths {
		if n > c.Snapshot.Tokens() || n <= o.Attack.Known {
			continue
		}
		g := o.Guess
		if o.Attack.Grows && n < c.Snapshot.Tokens() {
			var err error
			var skip *Skip
			if g, err = c.attack(ctx, o.Attack, c.Snapshot.First(n), engineTime); errors.As(err, &skip) {
				continue
			} else if err != nil {
				return nil, err
			}
		}
		plain := Guess{Tokens: g.Tokens}
		points = append(points, Point{n, ScoreOf(&plain, c.Truth[:n], o.Attack.Known).Rate})
	}
	return points, nil
}
