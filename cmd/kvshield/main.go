// Command kvshield shields the KV cache of llama.cpp engines: see `kvshield --help`.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/kvshield/kvshield/internal/settings"
)

const (
	exitDone  = 0
	exitError = 1
	exitUsage = 2
)

// exitCode ends the command with a program's own exit code, without a message.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// usageError is a command line that cannot be meant.
type usageError = settings.UsageError

func usagef(format string, a ...any) error { return usageError{Err: fmt.Errorf(format, a...)} }

func main() { os.Exit(Main()) }

// Main runs the command and returns its exit code.
func Main() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := newRoot().ExecuteContext(ctx)
	var code exitCode
	var usage usageError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &code):
		return int(code)
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "kvshield: %v\n", err)
		return exitUsage
	}
	fmt.Fprintf(os.Stderr, "kvshield: %v\n", err)
	return exitError
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "kvshield",
		Short: "keep the KV cache of llama.cpp engines unreadable on hardware you do not trust",
		Long: `kvshield runs stock llama.cpp engines so that the keys and values in their KV cache are permuted
by a secret that stays in an enclave process. Nothing of the engine is changed: a small library is
preloaded into it, and its answers stay what they were.

Start with:
  kvshield serve -m MODEL.gguf            a shielded llama-server behind an OpenAI-compatible address
  kvshield serve --engine ollama          a shielded Ollama, the same way
  kvshield run -- llama-cli -m MODEL.gguf any program that uses libllama, its children included
  kvshield audit -m MODEL.gguf            attack the KV cache, report what was recovered
  kvshield doctor MODEL.gguf              what is installed here and what would work

Every flag can be set in the environment: --data-plane is KVSHIELD_DATA_PLANE.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return settings.FromEnvironment(cmd.Flags())
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("there is no command %q; see `kvshield --help`", args[0])
			}
			return cmd.Help()
		},
		Args: cobra.ArbitraryArgs,
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%v; see `%s --help`", err, cmd.CommandPath())
	})
	root.AddCommand(newServe(), newRun(), newAttest(), newDoctor(), newBench(), newAudit(), newOllama())
	return root
}

// exactly is cobra's argument check with our exit code.
func exactly(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usagef("%v; see `%s --help`", err, cmd.CommandPath())
		}
		return nil
	}
}
