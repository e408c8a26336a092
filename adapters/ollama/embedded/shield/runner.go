// Package shield makes an Ollama server out of kvshield's parts: a [Server] starts what its runners talk to, [Runner] turns a
// process into a shielded runner.
package shield

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/kvshield/kvshield/adapters/ollama/embedded/hook"
	"github.com/kvshield/kvshield/internal/settings"
)

// Runner prepares this process for `kvshield-ollama runner ARGUMENTS` and returns the arguments to go on with. Its errors begin with
// "error:", the word by which Ollama finds what to tell its client.
func Runner(args []string) ([]string, error) {
	if os.Getenv(modeVariable) == settings.Off {
		hook.Off()
		return args, nil
	}
	if os.Getenv(socketVariable) == "" {
		return nil, errors.New("error: a runner of kvshield-ollama is started by `kvshield-ollama serve` alone, which has the enclave")
	}
	switch {
	case len(args) > 0 && args[0] == "--ollama-engine":
		return ollama(args)
	case len(args) > 0 && strings.HasSuffix(args[0], "-engine"):
		return nil, fmt.Errorf("error: kvshield cannot shield Ollama's engine %s; use a model in GGUF format, or KVSHIELD_MODE=off", strings.TrimPrefix(args[0], "--"))
	}
	hook.Llama()
	return args, nil
}

// ollama exchanges the model in the arguments of a runner of Ollama's own engine.
func ollama(args []string) ([]string, error) {
	args = slices.Clone(args)
	for i := 1; i < len(args); i++ {
		model, joined := strings.CutPrefix(args[i], "--model=")
		if args[i] == "--model" && i+1 < len(args) {
			model, joined = args[i+1], false
			i++
		} else if !joined {
			continue
		}
		path, err := hook.Ollama(model)
		var refused *hook.RefusedError
		if errors.As(err, &refused) {
			return nil, refuse(args, "error: "+model+": "+refused.Reason)
		}
		if err != nil {
			return nil, err
		}
		args[i] = path
		if joined {
			args[i] = "--model=" + path
		}
		return args, nil
	}
	_, err := hook.Ollama("")
	return args, err
}
