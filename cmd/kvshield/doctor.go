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
	"github.com/kvshield/kvshield/enclave"
)

// finding is one thing that doctor looked at.
type finding struct {
	What   string `json:"what"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
	Advice string `json:"advice,omitempty"`
}

func newDoctor() *cobra.Command {
	var o options
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor [MODEL.gguf]",
		Short: "say what is installed, what would work with it, and what to do about the rest",
		Long: `Looks at kvshield's own parts, the enclave, and the engines on this machine; with a model, whether it can
be shielded and what that takes. The exit code is 1 when something that is needed is missing.`,
		Args: exactly(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			findings, err := examine(cmd.Context(), &o, args)
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), findings)
			} else {
				printFindings(cmd.OutOrStdout(), findings)
			}
			for _, f := range findings {
				if !f.OK && err == nil {
					err = exitCode(exitError)
				}
			}
			return err
		},
	}
	o.register(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func examine(ctx context.Context, o *options, args []string) ([]finding, error) {
	cfg, err := o.config()
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
	if len(args) > 0 {
		findings = append(findings, modelFinding(ctx, s, args[0]))
	}
	return findings, nil
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

func modelFinding(ctx context.Context, s *supervisor.Supervisor, path string) finding {
	m, err := s.Inspect(ctx, path)
	switch {
	case err != nil:
		return finding{"model", false, fmt.Sprintf("%s: %v", path, err), ""}
	case m.Action == enclave.Pass:
		return finding{"model", true, fmt.Sprintf("%s: no language model (architecture %q); engines open it as it is", path, m.Architecture), ""}
	}
	shape := fmt.Sprintf("%s: %s, %d layers, %d query heads, %d key/value heads of %d", path, m.Architecture, m.Layers, m.Heads, m.HeadsKV, m.HeadDim)
	if m.Action == enclave.Reside {
		perToken := int64(m.Layers) * int64(m.HeadsKV) * int64(m.HeadDim) * 2 * 2
		return finding{"model", true, fmt.Sprintf("%s; mode resident keeps its cache, about %.1f KiB for each token of context, if its graph turns out to be one that it understands", shape, float64(perToken)/1024), ""}
	}
	return finding{"model", true, fmt.Sprintf("%s; mode permute shields it, "+
		"rewriting %.1f MiB of %.1f MiB, which is what it takes in memory beside the file",
		shape, mib(m.ShieldBytes), mib(m.Bytes)), ""}
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
