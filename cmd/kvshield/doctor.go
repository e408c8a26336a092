package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/adapters/supervisor"
)

// finding is one thing that doctor looked at.
type finding struct {
	What   string `json:"what"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
	Advice string `json:"advice,omitempty"`
}

func newDoctor() *cobra.Command {
	var o doctorOptions
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor [MODEL.gguf]",
		Short: "say what is installed, what would work with it, and what to do about the rest",
		Long: `Looks at kvshield's own parts, the enclave, and the engines on this machine; with a model, what it is, which
modes can shield it and why not, and the memory that each takes at a given context. The exit code is 1 when something
that is needed is missing, or when no mode (or not the one given with --mode) can shield the model.`,
		Args: exactly(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.onlyMode = cmd.Flags().Changed("mode")
			findings, err := examine(cmd.Context(), &o, args)
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), findings)
			} else {
				printFindings(cmd.OutOrStdout(), findings)
			}
			if err == nil && needed(findings) {
				return exitCode(exitError)
			}
			return err
		},
	}
	o.register(cmd)
	cmd.Flags().IntVar(&o.context, "context", 0, "the context to say the memory for, in tokens (0: what the model was made for)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func examine(ctx context.Context, o *doctorOptions, args []string) ([]finding, error) {
	cfg, err := o.Config()
	if err != nil {
		return nil, err
	}
	findings := []finding{
		fileFinding("hook library", cfg.Hook),
		fileFinding("enclave program", cfg.Enclave),
	}
	for _, program := range []string{"llama-server", "llama-completion", "llama-bench"} {
		findings = append(findings, engineFinding(ctx, program))
	}
	s, err := supervisor.New(ctx, cfg)
	if err != nil {
		return append(findings, finding{"enclave", false, err.Error(), ""}), nil
	}
	defer s.Close()
	findings = append(findings, enclaveFinding(ctx, s))
	if len(args) == 0 {
		return findings, nil
	}
	model, err := o.modelFindings(ctx, args[0])
	return append(findings, model...), err
}

func fileFinding(what, path string) finding {
	if info, err := os.Stat(path); err != nil || info.IsDir() {
		return finding{what, false, path + " is missing", "run `make build`"}
	}
	return finding{what, true, path, ""}
}

func engineFinding(ctx context.Context, program string) finding {
	path, err := llamacpp.Find(program)
	if err != nil {
		return finding{program, false, "not found", "run `make engine` for a private one, or install llama.cpp with shared libraries"}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, _ := exec.CommandContext(ctx, path, "--version").CombinedOutput() // llama-bench has no such option
	for line := range strings.Lines(string(out)) {
		if rest, ok := strings.CutPrefix(line, "version: "); ok {
			return finding{program, true, path + ", version " + strings.TrimSpace(rest), ""}
		}
	}
	return finding{program, true, path, ""}
}

func enclaveFinding(ctx context.Context, s *supervisor.Supervisor) finding {
	report, err := s.Attest(ctx, nil)
	if err != nil {
		return finding{"enclave", false, err.Error(), ""}
	}
	f := finding{"enclave", true, report.Statement, ""}
	if len(report.Missing) > 0 {
		f.Advice = "this machine does not give: " + strings.Join(report.Missing, "; ")
	}
	return f
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

func printFindings(w io.Writer, findings []finding) {
	for _, f := range findings {
		mark := "ok  "
		if !f.OK {
			mark = "MISS"
		}
		fmt.Fprintf(w, "%s  %-17s %s\n", mark, f.What, f.Detail)
		if f.Advice != "" {
			fmt.Fprintf(w, "%24s%s\n", "-> ", f.Advice)
		}
	}
}
