package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/kvshield/kvshield/adapters/ollama/service"
	"github.com/kvshield/kvshield/internal/settings"
)

// ollamaFlags are those of `kvshield ollama …`.
type ollamaFlags struct {
	root, mode, program string
	dry, noRestart      bool
	asJSON              bool
}

func newOllama() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ollama",
		Short: "shield the installed Ollama service",
		Long: `Puts the systemd service of an installed Ollama under ` + "`kvshield run`" + ` by a drop-in, and takes it back. Nothing of
Ollama's is changed. It is for an Ollama that starts a llama-server for each model; see docs/ollama.md.`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("there is no command %q; use enable, disable or status", args[0])
			}
			return cmd.Help()
		},
	}
	cmd.AddCommand(newOllamaEnable(), newOllamaDisable(), newOllamaStatus())
	return cmd
}

func (f *ollamaFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.root, "root", "/", "folder that holds the system, to prepare one that is not running")
	_ = cmd.MarkFlagDirname("root")
}

func (f *ollamaFlags) registerChange(cmd *cobra.Command) {
	f.register(cmd)
	cmd.Flags().BoolVar(&f.dry, "dry-run", false, "say what would be done, and do nothing")
	cmd.Flags().BoolVar(&f.noRestart, "no-restart", false, "leave it to you to have systemd read the change and start the service again")
}

func newOllamaEnable() *cobra.Command {
	var f ollamaFlags
	cmd := &cobra.Command{
		Use:   "enable",
		Short: "start the service under `kvshield run` from now on",
		Example: `  sudo kvshield ollama enable
  kvshield ollama enable --dry-run`,
		Args: exactly(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := settings.CheckMode(f.mode); err != nil {
				return err
			}
			if f.mode == modeOff {
				return usagef("--mode off would shield nothing; `kvshield ollama disable` takes the shield back")
			}
			return f.enable(cmd.Context(), cmd.OutOrStdout())
		},
	}
	f.registerChange(cmd)
	cmd.Flags().StringVar(&f.mode, "mode", defaultMode, "what the accelerator's cache holds: resident or permute; see docs/modes.md")
	cmd.Flags().StringVar(&f.program, "program", "", "path of kvshield as the service is to find it (default: this one)")
	_ = cmd.RegisterFlagCompletionFunc("mode", cobra.FixedCompletions([]string{modeResident, modePermute}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func newOllamaDisable() *cobra.Command {
	var f ollamaFlags
	cmd := &cobra.Command{
		Use:   "disable",
		Short: "start the service as it was before",
		Args:  exactly(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := service.Find(f.root)
			if err != nil {
				return err
			}
			change, err := s.Disable(f.dry)
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if !change.Written {
				fmt.Fprintln(out, "not enabled; nothing was changed")
				return nil
			}
			fmt.Fprintf(out, "%s %s\n", f.verb("removed", "would remove"), change.Path)
			return f.next(cmd.Context(), out)
		},
	}
	f.registerChange(cmd)
	return cmd
}

func newOllamaStatus() *cobra.Command {
	var f ollamaFlags
	cmd := &cobra.Command{
		Use:   "status",
		Short: "say whether the service is shielded, by which mode and TEE, and for which models",
		Long: `Says what is enabled, and what shields the service that runs now. What runs is said by the run itself, in its
runtime directory: root, or the service's own user, can read it.`,
		Args: exactly(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := service.Find(f.root)
			if err != nil {
				return err
			}
			st := s.Status()
			if f.asJSON {
				return printJSON(cmd.OutOrStdout(), st)
			}
			printOllama(cmd.OutOrStdout(), st)
			return nil
		},
	}
	f.register(cmd)
	cmd.Flags().BoolVar(&f.asJSON, "json", false, "print JSON")
	return cmd
}

func (f *ollamaFlags) enable(ctx context.Context, out io.Writer) error {
	s, err := service.Find(f.root)
	if err != nil {
		return err
	}
	program, err := f.self(s)
	if err != nil {
		return err
	}
	change, err := s.Enable(service.Options{Command: program, Mode: f.mode}, f.dry)
	if err != nil {
		return err
	}
	if !change.Written {
		fmt.Fprintf(out, "enabled already, mode %s: %s; nothing was changed\n", f.mode, change.Path)
		return nil
	}
	fmt.Fprintf(out, "%s %s:\n\n%s\n", f.verb("wrote", "would write"), change.Path, change.Text)
	return f.next(ctx, out)
}

// self is the path of this command in the service's eyes, checked where that can be done.
func (f *ollamaFlags) self(s *service.Service) (string, error) {
	if f.program != "" {
		if !filepath.IsAbs(f.program) {
			return "", usagef("--program %s: systemd takes a full path", f.program)
		}
		return f.program, nil
	}
	program, err := os.Executable()
	if err != nil {
		return "", err
	}
	if f.root != "/" {
		return program, nil
	}
	return program, s.Reachable(program, settings.Besides(os.Getenv("KVSHIELD_ENCLAVE"), "kvshield-enclave"), settings.Besides(os.Getenv("KVSHIELD_HOOK"), "libkvshield.so"))
}

func (f *ollamaFlags) verb(done, dry string) string {
	if f.dry {
		return dry
	}
	return done
}

// next has systemd heed a change, or says how.
func (f *ollamaFlags) next(ctx context.Context, out io.Writer) error {
	switch {
	case f.dry:
		return nil
	case f.root != "/":
		fmt.Fprintln(out, "it counts when the system of that root is started")
		return nil
	case f.noRestart || !service.Booted():
		fmt.Fprintln(out, "next: systemctl daemon-reload && systemctl restart ollama")
		return nil
	}
	if err := service.Reload(ctx); err != nil {
		return fmt.Errorf("%w; then: systemctl daemon-reload && systemctl restart ollama", err)
	}
	fmt.Fprintln(out, "systemd has read it, and the service was started again if it ran; see `kvshield ollama status`")
	return nil
}

func printOllama(w io.Writer, st service.Status) {
	fmt.Fprintf(w, "unit:      %s\nollama:    %s (generation: %s)\n", st.Unit, st.Program, st.Generation)
	if st.Enabled {
		fmt.Fprintf(w, "enabled:   yes, %s\n", st.DropIn)
	} else {
		fmt.Fprintln(w, "enabled:   no")
	}
	switch {
	case st.Shielded && !st.Hardware:
		fmt.Fprintf(w, "running:   shielded, mode %s, TEE %s: no hardware protection\n", st.Mode, st.TEE)
	case st.Shielded:
		fmt.Fprintf(w, "running:   shielded, mode %s, TEE %s\n", st.Mode, st.TEE)
	case st.Running:
		fmt.Fprintln(w, "running:   IN THE CLEAR, or you may not read what shields it: see as root")
	default:
		fmt.Fprintln(w, "running:   no")
	}
	for _, m := range st.Models {
		name := m.Name
		if name == "" {
			name = m.Path
		}
		how := m.How
		if how == "clear" {
			how = "IN THE CLEAR, as is allowed:"
		}
		fmt.Fprintf(w, "  %-9s %s (process %d)\n", how, name, m.PID)
	}
	if st.Warning != "" {
		fmt.Fprintf(w, "warning:   %s\n", st.Warning)
	}
}
