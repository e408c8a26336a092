// Command kvshield-ollama is Ollama with the engines that it carries inside, shielded: every command of ollama.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/ollama/ollama/cmd"
	"github.com/spf13/cobra"

	"github.com/kvshield/kvshield/adapters/ollama/embedded/shield"
	"github.com/kvshield/kvshield/internal/settings"
)

const exitUsage = 2

func main() {
	err := run(context.Background())
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "Error:", err)
	var usage settings.UsageError
	if errors.As(err, &usage) {
		os.Exit(exitUsage)
	}
	os.Exit(1)
}

func run(ctx context.Context) error {
	if len(os.Args) > 1 && os.Args[1] == "runner" {
		args, err := shield.Runner(os.Args[2:])
		if err != nil {
			return err
		}
		os.Args = append(os.Args[:2:2], args...)
	}
	cli := cmd.NewCLI()
	if err := shieldServer(cli); err != nil {
		return err
	}
	return cli.ExecuteContext(ctx)
}

// shieldServer puts the shield around Ollama's own `serve`.
func shieldServer(cli *cobra.Command) error {
	serve, _, err := cli.Find([]string{"serve"})
	if err != nil {
		return err
	}
	server, plain := shield.NewServer(serve.Flags()), serve.RunE
	serve.Short += ", shielded by kvshield"
	serve.RunE = func(cmd *cobra.Command, args []string) error {
		stop, err := server.Start(cmd.Context())
		if err != nil {
			return err
		}
		defer stop()
		return plain(cmd, args)
	}
	return nil
}
