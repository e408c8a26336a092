package watch

import (
	"debug/buildinfo"
	"os"
	"slices"
)

const (
	ollamaPath   = "github.com/ollama/ollama" // of its main package
	embeddedPath = "github.com/kvshield/kvshield/adapters/ollama/embedded/cmd/kvshield-ollama"
	runnerWord   = "runner" // `ollama runner …` is one of its own engines
	modelOption  = "--model"
	unknownModel = "(not named)"
)

func builtFrom(path string) func(*os.File) bool {
	return func(f *os.File) bool {
		info, err := buildinfo.Read(f)
		return err == nil && info.Path == path
	}
}

// isOllama says whether the process is Ollama, as far as that has been found out.
func (p *process) isOllama(files *catalogue) bool {
	switch files.isOllama(p.path("exe")) {
	case yes:
		return true
	case unexamined:
		p.undecided = true
	}
	return false
}

func (p *process) isRunner() bool { return len(p.arguments) > 1 && p.arguments[1] == runnerWord }

// storesModels says whether reading models in bulk is what the process is for. While that is being found out it is given
// the benefit of the doubt, for some milliseconds.
func (p *process) storesModels(files *catalogue) bool {
	if p.isRunner() {
		return false
	}
	// The ggml in kvshield-ollama has the hook linked to it, and its runners do not start without an enclave.
	if own := files.isEmbedded(p.path("exe")); own != no {
		p.undecided = p.undecided || own == unexamined
		return true
	}
	if !p.isOllama(files) {
		return p.undecided
	}
	return !p.hasUnhookedGGML(files)
}

// judgeMLX ends an Ollama engine that is neither llama-server nor has ggml inside: what it loads is no GGUF and would be
// seen by nothing else.
func (p *process) judgeMLX(files *catalogue) *finding {
	if !p.isRunner() || !p.isOllama(files) || p.hasUnhookedGGML(files) || p.undecided {
		return nil
	}
	name := unknownModel
	if i := slices.Index(p.arguments, modelOption); i >= 0 && i+1 < len(p.arguments) {
		name = p.arguments[i+1]
	}
	return &finding{model: &model{name: name}, evidence: "is about to load it", cause: MLXEngine}
}
