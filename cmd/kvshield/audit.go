package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/audit/play"
	"github.com/kvshield/kvshield/audit/report"
	"github.com/kvshield/kvshield/internal/settings"
)

// exitLeak is the exit code of --fail-above.
const exitLeak = 3

// promptMax is how large a user's conversation can be: more than any context holds.
const promptMax = 1 << 20

type auditFlags struct {
	options
	modes, attacks                         []string
	model, engine, prompt, cacheType, html string
	asJSON                                 bool
	failAbove                              float64
}

func newAudit() *cobra.Command {
	var f auditFlags
	cmd := &cobra.Command{
		Use:   "audit -m MODEL.gguf [flags] [-- llama-server arguments]",
		Short: "attack the KV cache of a real run and report what was recovered",
		Long: `Plays a conversation on a real llama-server, stock and in each mode, takes what an accelerator would have held,
attacks it, and prints how much of the conversation came back, beside what guessing gives. The attacks know the
public model and this program, but neither keys nor the tokens they look for; docs/audit.md describes each.

With --fail-above PERCENT the exit code is 3 when any attack recovers more from a shielded mode (from mode off, when
that is the only one), so that an audit can be part of a CI. The conversation is printed, and written nowhere but
into the file that --html names.`,
		Example: `  kvshield audit -m model.gguf
  kvshield audit -m model.gguf --mode permute --prompt letter.txt --html report.html
  kvshield audit -m model.gguf --mode permute --attack naive-values --fail-above 1 --json`,
		Args: exactly(func(cmd *cobra.Command, args []string) error {
			if at := cmd.ArgsLenAtDash(); len(args) > 0 && at != 0 {
				return fmt.Errorf("unexpected argument %q; arguments for llama-server go behind --", args[0])
			}
			return nil
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runAudit(cmd.Context(), cmd.OutOrStdout(), &f, args)
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&f.model, "model", "m", "", "path of the model, a GGUF file")
	flags.StringSliceVar(&f.modes, "mode", []string{modeOff, modePermute, modeResident}, "modes to audit: off (the stock engine), permute, resident")
	flags.StringSliceVar(&f.attacks, "attack", nil, "attacks to run, by their keys (default: all)")
	flags.StringVar(&f.prompt, "prompt", "", "file with the text of a conversation of your own, - for standard input (default: a built-in one)")
	flags.StringVar(&f.cacheType, "cache-type", "f16", "type of cached keys and values: f32, f16, bf16 or q8_0")
	flags.StringVar(&f.engine, "engine", "llama-server", "llama-server to run: a name or a path")
	flags.BoolVar(&f.asJSON, "json", false, "print JSON (docs/audit.md)")
	flags.StringVar(&f.html, "html", "", "write a report for people into this file")
	flags.Float64Var(&f.failAbove, "fail-above", -1, "exit with 3 when an attack recovers more than this percentage of the tokens")
	f.registerShield(cmd)
	_ = cmd.MarkFlagFilename("model", "gguf")
	return cmd
}

func (f *auditFlags) check() error {
	for _, mode := range f.modes {
		if err := settings.CheckMode(mode); err != nil {
			return err
		}
	}
	switch {
	case f.model == "":
		return usagef("name a model with -m MODEL.gguf")
	case len(f.modes) == 0:
		return usagef("name at least one mode with --mode")
	case !slices.Contains([]string{"f32", "f16", "bf16", "q8_0"}, f.cacheType):
		return usagef("there is no cache type %q; use f32, f16, bf16 or q8_0", f.cacheType)
	case f.failAbove > 100:
		return usagef("--fail-above %v: it takes a percentage", f.failAbove)
	}
	return nil
}

func runAudit(ctx context.Context, out io.Writer, f *auditFlags, args []string) error {
	if err := f.check(); err != nil {
		return err
	}
	talk, err := f.conversation()
	if err != nil {
		return err
	}
	server, err := llamacpp.Find(f.engine)
	if err != nil {
		return err
	}
	r, err := play.Run(ctx, play.Config{
		Model: f.model, Server: server, Args: args, Modes: f.modes, CacheType: f.cacheType, Talk: talk, Attacks: f.attacks,
		Progress: func(what string) func() { return progress("%s", what) }, NewShield: f.shieldFor(ctx),
	})
	var unknown *play.UnknownAttackError
	switch {
	case errors.As(err, &unknown):
		return usageError{Err: err}
	case err != nil && ctx.Err() != nil:
		return errors.New("the audit was interrupted before its end; nothing of it is left, run it again for figures")
	case err != nil:
		return err
	}
	if err := f.show(out, r); err != nil {
		return err
	}
	return f.verdict(r)
}

func (f *auditFlags) conversation() (play.Conversation, error) {
	if f.prompt == "" {
		return play.BuiltIn(), nil
	}
	in := os.Stdin
	if f.prompt != "-" {
		file, err := os.Open(f.prompt)
		if err != nil {
			return play.Conversation{}, err
		}
		defer file.Close()
		in = file
	}
	text, err := io.ReadAll(io.LimitReader(in, promptMax+1))
	switch {
	case err != nil:
		return play.Conversation{}, err
	case len(text) > promptMax:
		return play.Conversation{}, usagef("--prompt %s: more than %d bytes, which no context holds", f.prompt, promptMax)
	case strings.TrimSpace(string(text)) == "":
		return play.Conversation{}, usagef("--prompt %s: there is nothing in it", f.prompt)
	}
	return play.Conversation{Name: filepath.Base(f.prompt), Turns: []string{string(text)}, Answer: play.BuiltIn().Answer}, nil
}

func (f *auditFlags) shieldFor(ctx context.Context) func(string) (play.Shield, string, error) {
	return func(mode string) (play.Shield, string, error) {
		o := f.options
		o.Mode = mode
		cfg, err := o.Config()
		if err != nil {
			return nil, "", err
		}
		cfg.Audit, cfg.Observe = true, mode == modeOff
		// A signal ends the engine first, then what it depends on.
		s, err := supervisor.New(context.WithoutCancel(ctx), cfg)
		if err != nil {
			return nil, "", err
		}
		if cfg.Observe {
			return s, "", nil
		}
		about, err := s.Attest(ctx, nil)
		if err != nil {
			s.Close()
			return nil, "", err
		}
		return s, about.Backend, nil
	}
}

func (f *auditFlags) show(out io.Writer, r *audit.Report) error {
	if f.html != "" {
		if err := writeReport(f.html, r); err != nil {
			return err
		}
	}
	if f.asJSON {
		return printJSON(out, r)
	}
	_, err := unix.IoctlGetTermios(int(os.Stdout.Fd()), unix.TCGETS)
	return report.WriteTable(out, r, err == nil && os.Getenv("NO_COLOR") == "")
}

// writeReport leaves either the whole page or what was there before. The page holds a conversation: it is for its owner alone.
func writeReport(path string, r *audit.Report) error {
	file, err := os.CreateTemp(filepath.Dir(path), ".kvshield-audit-*")
	if err != nil {
		return fmt.Errorf("cannot write the report: %w", err)
	}
	defer os.Remove(file.Name())
	if err := errors.Join(report.WriteHTML(file, r), file.Close()); err != nil {
		return fmt.Errorf("cannot write the report: %w", err)
	}
	return os.Rename(file.Name(), path)
}

func (f *auditFlags) verdict(r *audit.Report) error {
	if f.failAbove < 0 {
		return nil
	}
	leaks := false
	for i := range r.Runs {
		run := &r.Runs[i]
		if run.Mode == modeOff && len(r.Runs) > 1 {
			continue
		}
		if share, attack := run.Worst(); 100*share > f.failAbove {
			say("mode %s: %s recovers %.1f %% of the tokens, more than the %v %% allowed", run.Mode, attack, 100*share, f.failAbove)
			leaks = true
		}
	}
	if leaks {
		return exitCode(exitLeak)
	}
	return nil
}
