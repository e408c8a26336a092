package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/adapters/ollama/client"
	"github.com/kvshield/kvshield/adapters/ollama/server"
	"github.com/kvshield/kvshield/adapters/ollama/service"
	"github.com/kvshield/kvshield/internal/settings"
	"github.com/kvshield/kvshield/proxy"
	"github.com/kvshield/kvshield/proxy/policy"
)

// Names of the two generations' programs.
const (
	ollamaName   = "ollama"
	embeddedName = "kvshield-ollama"
)

func isOllama(program string) bool {
	name := filepath.Base(program)
	return name == ollamaName || name == embeddedName
}

func serveOllama(ctx context.Context, f *serveFlags, p *front, args []string) error {
	switch {
	case f.model != "":
		return usagef("Ollama has models of its own; leave out -m, or --engine %s", f.engine)
	case len(args) > 0:
		return usagef("`ollama serve` takes no arguments; set it up by its variables (OLLAMA_…)")
	}
	if err := p.oneTenant(); err != nil {
		return err
	}
	program, err := findOllamaProgram(f.engine)
	if err != nil {
		return err
	}
	return serveEngine(ctx, f, p, func() (*host, error) { return newOllamaHost(ctx, f, p, program) })
}

// findOllamaProgram finds the program of either generation.
func findOllamaProgram(name string) (string, error) {
	if filepath.Base(name) == name {
		if path, err := exec.LookPath(name); err == nil {
			return filepath.Abs(path)
		}
		if name == embeddedName {
			if path := settings.Besides("", name); exists(path) {
				return path, nil
			}
		}
	}
	path, err := llamacpp.Find(name)
	var missing *llamacpp.NotFoundError
	switch {
	case !errors.As(err, &missing):
		return path, err
	case filepath.Base(name) == embeddedName:
		return "", fmt.Errorf("%s is not there; build it with `make ollama` in the kvshield repository, or name it by its path", name)
	}
	return "", fmt.Errorf("%s is not installed; install Ollama, or name it with --engine PATH", name)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// ollamaHost is what a host has to know of the Ollama that it starts.
type ollamaHost struct {
	*host
	generation string
	tally      *tally
}

func newOllamaHost(ctx context.Context, f *serveFlags, p *front, program string) (*host, error) {
	generation := service.Generation(program)
	embedded := filepath.Base(program) == embeddedName
	if generation == "embedded" && !embedded && f.Mode != modeOff {
		return nil, fmt.Errorf("%s: %w", program, service.ErrEmbedded)
	}
	h, err := newHost(ctx, f, program)
	if err != nil {
		return nil, err
	}
	o := &ollamaHost{host: h, generation: generation, tally: newTally(h.log)}
	h.name, h.launch, h.describe, h.sweep = filepath.Base(program), o.start, o.status, o.sweepAll
	// Ollama's engines must not leave the tree that is watched when it dies before them.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		h.close()
		return nil, fmt.Errorf("cannot become the reaper of Ollama's children: %w", err)
	}
	if embedded {
		h.env = append(without(os.Environ(), "KVSHIELD_MODE", "KVSHIELD_SOCKET"), "KVSHIELD_MODE="+f.Mode)
		if h.shield != nil {
			h.env = append(h.env, "KVSHIELD_SOCKET="+h.shield.Socket())
		}
	}
	p.config.Ollama = true
	p.config.Observer = o.tally
	return h, nil
}

// without is an environment less some variables.
func without(env []string, names ...string) []string {
	var kept []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if !slices.Contains(names, name) {
			kept = append(kept, e)
		}
	}
	return kept
}

// start starts Ollama when nothing is left of the one before: its engines outlive it.
func (o *ollamaHost) start(ctx context.Context) (engine, error) {
	o.sweepAll()
	c := server.Config{Program: o.program, Env: o.env, Cloud: o.front.config.Policy.Allows(policy.Cloud)}
	if o.flags.verbose {
		c.Output = os.Stderr
	}
	s, err := server.Start(ctx, c)
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (o *ollamaHost) sweepAll() {
	descendants{exempt: func() int {
		if o.shield == nil {
			return 0
		}
		return o.shield.EnclavePID()
	}}.end()
}

func (o *ollamaHost) status(s *status) {
	if e := o.server.Load(); e != nil {
		s.Ollama = describeOllama(client.New(e.Dial), o.generation, o.tally)
	}
}

// findOllama is an Ollama that runs already.
func findOllama(ctx context.Context, f *serveFlags, p *front) (*upstream, error) {
	address, err := client.Address(f.ollamaHost)
	if err != nil {
		return nil, usagef("--ollama-host %s: %v", f.ollamaHost, err)
	}
	u, err := newUpstream(p, "Ollama at "+address, address)
	if err != nil {
		return nil, err
	}
	c := client.New(u.dial)
	if !p.config.Policy.Allows(policy.Cloud) {
		if err := c.Local(ctx); err != nil {
			return nil, fmt.Errorf("%s: %w; start it with OLLAMA_NO_CLOUD=1, or have that allowed with --allow %s", u.name, err, policy.Cloud)
		}
	}
	generation := "unknown"
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", u.program.PID)); err == nil {
		generation = service.Generation(exe)
	}
	t := newTally(p.config.Log)
	u.describe = func(s *status) { s.Ollama = describeOllama(c, generation, t) }
	p.config.Ollama = true
	p.config.Observer = t
	return u, nil
}

// ollamaStatus is what /kvshield/status shows of an Ollama.
type ollamaStatus struct {
	Generation string `json:"generation"` // current, embedded or unknown
	Error      string `json:"error,omitempty"`
	*client.State
	Answers answers `json:"answers"`
}

const describeWithin = 2 * time.Second

func describeOllama(c *client.Client, generation string, t *tally) *ollamaStatus {
	ctx, cancel := context.WithTimeout(context.Background(), describeWithin)
	defer cancel()
	s := &ollamaStatus{Generation: generation, Answers: t.sum()}
	state, err := c.State(ctx)
	if err != nil {
		s.Error = "Ollama does not answer"
		return s
	}
	s.State = &state
	return s
}

var _ proxy.Observer = (*tally)(nil)
