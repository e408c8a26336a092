package play

import (
	"context"

	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/audit/slotfile"
)

const (
	likely      = 64   // tokens that the model is asked for as the likeliest next ones
	priorTokens = 2048 // of the model's own text that are counted
	smoothing   = 0.5  // added to each count
)

// ownEngine is the attacker's engine, which runs the public model.
type ownEngine struct {
	*client
	shape slotfile.Shape
}

// Extend implements audit.Engine.
func (e *ownEngine) Extend(ctx context.Context, prefix []int32, token int32) (*audit.Step, error) {
	if e.shape.Sliding != nil {
		return nil, &audit.Skip{Reason: "slot files of models with sliding windows lack the rows that it compares"}
	}
	prompt := append(append([]int32(nil), prefix...), token)
	a, err := e.complete(ctx, prompt, 1, map[string]any{"n_probs": likely})
	if err != nil {
		return nil, err
	}
	f, err := e.slot(ctx, e.shape, 0)
	if err != nil {
		return nil, err
	}
	step := &audit.Step{}
	at := len(prefix)
	for _, l := range f.Snapshot.Layers {
		step.Layers = append(step.Layers, audit.Layer{K: one(l.K, at), V: one(l.V, at)})
	}
	if len(a.Probs) > 0 {
		for _, t := range a.Probs[0].Top {
			step.Next = append(step.Next, t.ID)
		}
	}
	return step, nil
}

func one(m audit.Matrix, i int) audit.Matrix {
	return audit.Matrix{Rows: 1, Cols: m.Cols, Data: m.Row(i)}
}

// prior counts tokens in text that the model writes by itself.
func (c *client) prior(ctx context.Context, vocabulary int, start []int32, tokens int) ([]float64, error) {
	counts := make([]float64, vocabulary)
	total := 0.0
	for seed := 0; tokens > 0; seed++ {
		n := min(tokens, 512)
		a, err := c.complete(ctx, start, n, map[string]any{"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "seed": seed + 1})
		if err != nil {
			return nil, err
		}
		for _, t := range a.Tokens {
			if t >= 0 && int(t) < vocabulary {
				counts[t]++
			}
		}
		total += float64(len(a.Tokens))
		tokens -= n
	}
	for i := range counts {
		counts[i] = (counts[i] + smoothing/float64(vocabulary)) / (total + smoothing)
	}
	return counts, nil
}
