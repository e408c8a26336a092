// Package bench measures what shielding costs: a stock engine against a shielded one, on the same machine, in the
// same run, in turns.
//
// Start with [Run]; print the [Report] with [Report.WriteTable], or as JSON (docs/bench.md). A run takes pairs of
// measurements, stock first, in each of four phases: load (llama-server, from its start until it is healthy),
// prefill and decode (llama-bench), and memory (llama-bench again, with its memory sampled and its speed ignored,
// because looking at a large process slows it down).
//
// Limits: Linux only; it needs llama-bench and llama-server of one build; its ratios mean something only when
// nothing else keeps the machine busy. Promises: no engine or enclave is left behind, whatever ends the run; a
// shielded measurement in which no model was shielded is an error.
package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/hooks/meter"
)

// Shield is what one shielded measurement runs under: a [supervisor.Supervisor].
type Shield interface {
	Environment(base []string) []string
	EnclavePID() int
	Events() supervisor.Events
	Totals() meter.Totals
	Close()
}

var _ Shield = (*supervisor.Supervisor)(nil)

// Config of a run.
type Config struct {
	Model    string   // path of the model
	Bench    string   // path of llama-bench
	Server   string   // path of llama-server
	Args     []string // further arguments of llama-bench
	Runs     int      // pairs per phase
	Prompt   int      // tokens of a prefill
	Generate int      // tokens of a decode
	Threads  int      // of the engine; zero: the engine's own choice
	Depths   []int    // tokens in the context before a decode, for the curve; none: no curve
	Prefills []int    // lengths of prefills, for the curve
	Device   bool     // the engine computes on a device: a cache on the host is another stock variant
	// Engines are times that an engine takes for a token by itself, for which the curve's model is asked.
	Engines   []time.Duration
	Mode      string // for the report
	DataPlane string // for the report
	// NewShield starts the shield of one measurement. Nil compares the stock engine with itself, which
	// shows how far two equal runs lie apart on this machine.
	NewShield func() (Shield, error)
	// Progress is called before each measurement, and the function it returns after it. Nil: silent.
	Progress func(what string) (done func())
}

// pair is one measurement on either side.
type pair[T any] struct{ stock, shielded T }

// measurements are the pairs of all phases.
type measurements struct {
	load            []pair[loading]
	prefill, decode []pair[speed]
	memory          []pair[memory]
}

// Run measures and sums up. When ctx ends it returns ctx's error, with every process it started gone.
func Run(ctx context.Context, c Config) (*Report, error) {
	if c.Runs < 1 || c.Prompt < 1 || c.Generate < 1 {
		return nil, errors.New("a benchmark needs at least one pair, one token of prompt and one to generate")
	}
	if c.Progress == nil {
		c.Progress = func(string) func() { return func() {} }
	}
	if err := c.warm(ctx); err != nil {
		return nil, err
	}
	var m measurements
	for i := range c.Runs {
		if err := c.round(ctx, i, &m); err != nil {
			return nil, err
		}
	}
	curve, err := c.measureCurve(ctx)
	if err != nil {
		return nil, err
	}
	r := c.report(&m)
	r.Curve, r.Predictions = curve, c.Engines
	return r, nil
}

// warm brings the model and the engine's own files into the page cache, so that the first pair differs in nothing
// from later ones.
func (c *Config) warm(ctx context.Context) error {
	done := c.Progress("warming up: reading the model, starting the engine once")
	defer done()
	if err := readModel(ctx, c.Model); err != nil {
		return err
	}
	_, err := c.measureLoad(ctx, nil)
	return err
}

// round takes one pair in every phase.
func (c *Config) round(ctx context.Context, i int, m *measurements) error {
	if err := take(ctx, c, "load", i, &m.load, c.measureLoad); err != nil {
		return err
	}
	if err := take(ctx, c, "prefill", i, &m.prefill, c.measurePrefill); err != nil {
		return err
	}
	if err := take(ctx, c, "decode", i, &m.decode, c.measureDecode); err != nil {
		return err
	}
	return take(ctx, c, "memory", i, &m.memory, c.measureMemory)
}

// measure is one measurement; the shield is nil on the stock side.
type measure[T any] func(context.Context, Shield) (T, error)

func take[T any](ctx context.Context, c *Config, phase string, i int, out *[]pair[T], f measure[T]) error {
	var p pair[T]
	sides := []struct {
		name  string
		start func() (Shield, error)
		into  *T
	}{{"stock", nil, &p.stock}, {"shielded", c.NewShield, &p.shielded}}
	for _, s := range sides {
		done := c.Progress(fmt.Sprintf("pair %d of %d: %s, %s", i+1, c.Runs, phase, s.name))
		got, err := under(ctx, s.start, f)
		done()
		if err != nil {
			return fmt.Errorf("%s, %s: %w", phase, s.name, err)
		}
		*s.into = got
	}
	*out = append(*out, p)
	return nil
}

// under measures under a shield of its own: its statistics are then those of this measurement alone.
func under[T any](ctx context.Context, start func() (Shield, error), f measure[T]) (T, error) {
	var zero T
	if err := ctx.Err(); err != nil {
		return zero, err
	}
	if start == nil {
		return f(ctx, nil)
	}
	shield, err := start()
	if err != nil {
		return zero, err
	}
	defer shield.Close()
	got, err := f(ctx, shield)
	if err != nil {
		return zero, explain(ctx, shield, err)
	}
	if shield.Events().Shielded == 0 {
		return zero, ErrNotShielded
	}
	return got, nil
}

// ErrNotShielded is an engine that the hook could not reach.
var ErrNotShielded = errors.New("the engine loaded its model past kvshield's hook; use a build of llama.cpp with shared libraries (BUILD_SHARED_LIBS=ON)")

// explain prefers what the shield knows about a failure to what the engine said about it.
func explain(ctx context.Context, shield Shield, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	e := shield.Events()
	for _, reasons := range [][]string{e.Refusals, e.Fatal} {
		if len(reasons) > 0 {
			return errors.New(reasons[len(reasons)-1])
		}
	}
	return err
}
