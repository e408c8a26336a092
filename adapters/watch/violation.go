package watch

import "fmt"

// Cause is why the hook does not reach a program.
type Cause int

const (
	// Reachable: nothing keeps the hook out.
	Reachable Cause = iota
	// StaticProgram has no dynamic linker that could preload the hook.
	StaticProgram
	// SetuidProgram is setuid, setgid or has file capabilities: the linker ignores LD_PRELOAD.
	SetuidProgram
	// CleanedEnvironment: the program could be reached, but was started without LD_PRELOAD.
	CleanedEnvironment
	// EmbeddedEngine: the hook is there, but ggml lies inside the program or one of its libraries,
	// and calls inside one object are not interposed.
	EmbeddedEngine
	// OtherEngine: the hook is there and no ggml was found.
	OtherEngine
	// MLXEngine is Ollama's own engine for models in another format than GGUF.
	MLXEngine
	// Script is run by its interpreter; look at that.
	Script
)

var causes = map[Cause]struct{ name, why, remedy string }{
	Reachable: {"reachable", "nothing keeps the hook out of it", ""},
	StaticProgram: {"static program", "it is statically linked, so the hook cannot be preloaded",
		"use a build of llama.cpp with shared libraries (BUILD_SHARED_LIBS=ON) and a dynamically linked program"},
	SetuidProgram: {"setuid program", "it is setuid, setgid or has file capabilities, so the hook is not preloaded",
		"use a copy of the program without these rights"},
	CleanedEnvironment: {"cleaned environment", "the hook is not loaded in it; its environment was cleaned on the way",
		"start it with LD_PRELOAD and KVSHIELD_SOCKET kept from kvshield's environment"},
	EmbeddedEngine: {"embedded engine", "ggml is linked into it, where the hook cannot interpose",
		"use a build of llama.cpp with shared libraries (BUILD_SHARED_LIBS=ON), or kvshield-ollama for Ollama's embedded engine"},
	OtherEngine: {"other engine", "it did not load it through llama.cpp's shared libraries",
		"use a program on libllama; to copy or hash a model, do it outside kvshield"},
	MLXEngine: {"MLX engine", "it is Ollama's engine for models that are not GGUF, which kvshield has no hook for",
		"use the same model in GGUF format"},
	Script: {"script", "it is a script; its interpreter decides", "look at the interpreter"},
}

// String names the cause in two words.
func (c Cause) String() string {
	if text, ok := causes[c]; ok {
		return text.name
	}
	return fmt.Sprintf("cause %d", int(c))
}

// Remedy says which way would work; empty when none is needed.
func (c Cause) Remedy() string { return causes[c].remedy }

// Violation is a process that used a model in the clear, or could have.
type Violation struct {
	PID      int
	Program  string
	Model    string
	Evidence string // follows "it": "has 1.1 GiB of it mapped"
	Cause    Cause
	// Kill is why the process could not be ended; nil when it was.
	Kill error
}

func (v Violation) Error() string {
	fate := "ended before it could answer"
	if v.Kill != nil {
		fate = fmt.Sprintf("could NOT be ended (%v): end it by hand", v.Kill)
	}
	text := causes[v.Cause]
	return fmt.Sprintf("%s (process %d) %s: model %s would run unshielded: the process %s without having said hello, because %s; %s",
		v.Program, v.PID, fate, v.Model, v.Evidence, text.why, text.remedy)
}

// bytesText writes an amount for people.
func bytesText(n int64) string {
	value, units := float64(n), []string{"bytes", "KiB", "MiB", "GiB"}
	i := 0
	for ; value >= 1024 && i < len(units)-1; i++ {
		value /= 1024
	}
	if i == 0 || value == float64(int64(value)) {
		return fmt.Sprintf("%d %s", int64(value), units[i])
	}
	return fmt.Sprintf("%.1f %s", value, units[i])
}
