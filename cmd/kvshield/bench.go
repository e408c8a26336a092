package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/internal/bench"
)

type benchFlags struct {
	options
	model, engine                   string
	runs, prompt, generate, threads int
	asJSON                          bool
	depths, prefills                []int
	predict                         []time.Duration
	plot                            string
}

func newBench() *cobra.Command {
	var f benchFlags
	cmd := &cobra.Command{
		Use:   "bench -m MODEL.gguf [flags] [-- llama-bench arguments]",
		Short: "measure a shielded engine against the stock one, in turns, in the same run",
		Long: `Measures stock and shielded in turns: prefill and decode with the engine's own llama-bench, the time a
llama-server takes to load the model from a warm page cache, the highest memory of all processes of the run
together, and what one transition takes. Each shielded measurement has an enclave of its own, whose start is
not part of any figure; its memory is.

Ratios are medians over the pairs, with the lowest and the highest; they mean something only on a machine that does
nothing else meanwhile. With --mode off both sides are stock, which shows how far equal runs lie apart.
The structure that --json prints is described in docs/bench.md.`,
		Example: `  kvshield bench -m model.gguf
  kvshield bench -m model.gguf --runs 5 --json -- -fa off
  kvshield bench -m model.gguf --depth 128,1024,4096 --prefill 512,4096 --plot curve.svg --predict 10ms,5ms`,
		Args: exactly(func(cmd *cobra.Command, args []string) error {
			if at := cmd.ArgsLenAtDash(); len(args) > 0 && at != 0 {
				return fmt.Errorf("unexpected argument %q; arguments for llama-bench go behind --", args[0])
			}
			return nil
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			report, err := measureCost(cmd.Context(), &f, args)
			if err != nil {
				return err
			}
			if f.plot != "" {
				if err := writePlot(f.plot, report); err != nil {
					return err
				}
			}
			if f.asJSON {
				return printJSON(cmd.OutOrStdout(), report)
			}
			return report.WriteTable(cmd.OutOrStdout())
		},
	}
	f.register(cmd)
	cmd.Flags().StringVarP(&f.model, "model", "m", "", "path of the model, a GGUF file")
	cmd.Flags().StringVar(&f.engine, "engine", "llama-bench", "llama-bench to run: a name or a path; the llama-server beside it is measured too")
	cmd.Flags().IntVarP(&f.runs, "runs", "r", 3, "pairs of measurements, stock and shielded")
	cmd.Flags().IntVar(&f.prompt, "prompt", 512, "tokens of a prefill")
	cmd.Flags().IntVar(&f.generate, "generate", 64, "tokens of a decode")
	cmd.Flags().IntVar(&f.threads, "threads", 0, "threads of the engine (0: the engine's own choice)")
	cmd.Flags().IntSliceVar(&f.depths, "depth", nil, "also measure decode with this many tokens in the context, such as 128,1024,4096")
	cmd.Flags().IntSliceVar(&f.prefills, "prefill", nil, "also measure prefills of these lengths against the best stock variant, such as 512,4096")
	cmd.Flags().StringVar(&f.plot, "plot", "", "draw speed over context length into this file (SVG); needs --depth")
	cmd.Flags().DurationSliceVar(&f.predict, "predict", nil, "ask the curve's model about engines that take this long for a token, such as 20ms,5ms")
	cmd.Flags().BoolVar(&f.asJSON, "json", false, "print JSON")
	_ = cmd.MarkFlagFilename("model", "gguf")
	return cmd
}

func (f *benchFlags) check() error {
	switch {
	case f.model == "":
		return usagef("name a model with -m MODEL.gguf")
	case f.runs < 1 || f.prompt < 1 || f.generate < 1:
		return usagef("--runs, --prompt and --generate take 1 or more")
	case slices.ContainsFunc(f.depths, func(n int) bool { return n < 0 || n > 1<<20 }), slices.ContainsFunc(f.prefills, func(n int) bool { return n < 1 || n > 1<<20 }):
		return usagef("--depth takes numbers from 0, --prefill from 1, up to %d", 1<<20)
	case f.plot != "" && len(f.depths) < 2:
		return usagef("--plot draws a curve: name two context lengths or more with --depth")
	case f.threads < 0:
		return usagef("--threads takes 0 or more")
	}
	return f.checkMode()
}

func measureCost(ctx context.Context, f *benchFlags, args []string) (*bench.Report, error) {
	program, server, err := findBench(f.engine)
	if err != nil {
		return nil, err
	}
	cfg, err := f.Config()
	if err != nil {
		return nil, err
	}
	c := bench.Config{Model: f.model, Bench: program, Server: server, Args: args, Runs: f.runs, Prompt: f.prompt,
		Generate: f.generate, Threads: f.threads, Mode: f.Mode, DataPlane: f.DataPlane,
		Depths: f.depths, Prefills: f.prefills, Engines: f.predict, Device: hasDevice(args),
		Progress: func(what string) func() { return progress("%s", what) }}
	if f.Mode != modeOff {
		// A signal ends the engine first, then what it depends on.
		ctx := context.WithoutCancel(ctx)
		c.NewShield = func() (bench.Shield, error) { return newShield(ctx, cfg) }
	}
	report, err := bench.Run(ctx, c)
	if err != nil && ctx.Err() != nil {
		return nil, errors.New("the benchmark was interrupted before its end; nothing of it is left running, run it again for figures")
	}
	return report, err
}

// hasDevice says whether the engine was asked to put layers on a device.
func hasDevice(args []string) bool {
	return slices.ContainsFunc(args, func(a string) bool { return a == "-ngl" || a == "--n-gpu-layers" || a == "-dev" || a == "--device" })
}

// writePlot leaves either the whole plot or what was there before.
func writePlot(path string, r *bench.Report) error {
	file, err := os.CreateTemp(filepath.Dir(path), ".kvshield-plot-*")
	if err != nil {
		return fmt.Errorf("cannot write the plot: %w", err)
	}
	defer os.Remove(file.Name())
	if err := errors.Join(r.PlotSVG(file), file.Chmod(0o644), file.Close()); err != nil {
		return fmt.Errorf("cannot write the plot: %w", err)
	}
	return os.Rename(file.Name(), path)
}

// newShield keeps a nil supervisor from becoming a shield that is not nil.
func newShield(ctx context.Context, cfg supervisor.Config) (bench.Shield, error) {
	s, err := supervisor.New(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// findBench returns llama-bench and the llama-server of the same build, which lies beside it.
func findBench(engine string) (program, server string, err error) {
	if program, err = llamacpp.Find(engine); err != nil {
		return "", "", err
	}
	server, err = llamacpp.Find(filepath.Join(filepath.Dir(program), "llama-server"))
	var missing *llamacpp.NotFoundError
	if errors.As(err, &missing) {
		server, err = llamacpp.Find("llama-server")
	}
	return program, server, err
}
