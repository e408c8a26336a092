// Command kvshield-ollama is Ollama with the engines that it carries inside, shielded: every command of ollama.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/ollama/ollama/cmd"

	"github.com/kvshield/kvshield/adapters/ollama/embedded/hook"
	"github.com/kvshield/kvshield/adapters/ollama/embedded/shield"
)

func main() {
	if err := run(context.Background()); err != nil {
		if !errors.Is(err, hook.ErrRefused) { // which the hook has said
			fmt.Fprintln(os.Stderr, "Error:", err)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "serve", "start":
			stop, err := shield.Serve(ctx)
			if err != nil {
				return err
			}
			defer stop()
		case "runner":
			args, err := shield.Runner(os.Args[2:])
			if err != nil {
				return err
			}
			os.Args = append(os.Args[:2:2], args...)
		}
	}
	return cmd.NewCLI().ExecuteContext(ctx)
}
