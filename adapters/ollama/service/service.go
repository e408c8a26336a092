// Package service shields an installed Ollama service: a systemd drop-in that starts `ollama serve` under `kvshield run`.
//
// Start with [Find]; then [Service.Enable], [Service.Disable], [Service.Status]. Nothing of Ollama's is changed, and nothing is
// removed that this package did not write. It looks at files below a root folder, so that an image can be prepared that is not
// running; [Reload] and [Running] speak with the systemd of this machine.
//
// It is for the generation of Ollama that starts a llama-server for each model. The older one, with the engine inside its own
// executable, is out of the hook's reach, and refused here.
package service

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kvshield/kvshield/adapters/watch"
)

const (
	unitName = "ollama.service"
	unitMax  = 1 << 20
	// dropInName comes last among the drop-ins: `systemctl edit` writes override.conf, which may set ExecStart= too.
	dropInName = "zz-kvshield.conf"
	configDir  = "etc/systemd/system"
)

// unitDirs in the order in which systemd prefers them.
var unitDirs = []string{configDir, "run/systemd/system", "usr/local/lib/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"}

// What keeps Ollama from being shielded.
var (
	ErrNoSystemd = errors.New("there is no systemd here; start Ollama with `kvshield run -- ollama serve` instead")
	ErrNoUnit    = errors.New("there is no " + unitName + " here; install Ollama, or start it with `kvshield run -- ollama serve`")
	ErrMasked    = errors.New(unitName + " is masked; `systemctl unmask ollama` first")
	// ErrEmbedded is the other generation of Ollama.
	ErrEmbedded = errors.New("this Ollama has its engine inside the executable (0.17 and older), where kvshield cannot reach it; use kvshield-ollama in its place, or install a newer Ollama")
)

// Service is an installed Ollama service.
type Service struct {
	Root    string // "/" or where a scratch root lies
	Unit    string // path of its unit file, without the root
	Program string // of Ollama, without the root
	User    string // empty: root

	settings []setting // of the unit and all drop-ins but ours
	after    []string  // drop-ins that systemd reads after ours and that set ExecStart=
}

// Find looks for the service below root.
func Find(root string) (*Service, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	s := &Service{Root: root}
	if !slices.ContainsFunc(unitDirs, func(dir string) bool { return isDir(filepath.Join(root, dir)) }) {
		return nil, ErrNoSystemd
	}
	for _, dir := range unitDirs {
		path := "/" + dir + "/" + unitName
		text, err := s.read(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		s.Unit = path
		return s, s.understand(text)
	}
	return nil, ErrNoUnit
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// read reads a small file of the root, following links inside it.
func (s *Service) read(path string) (string, error) {
	real, err := s.resolve(path)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(real)
	switch {
	case err != nil:
		return "", noRight(err)
	case info.Mode()&os.ModeDevice != 0:
		return "", ErrMasked // a link to /dev/null
	case !info.Mode().IsRegular() || info.Size() > unitMax:
		return "", fmt.Errorf("%s is no unit file", path)
	}
	text, err := os.ReadFile(real)
	return string(text), noRight(err)
}

const linksMax = 16

// resolve follows a path's last link as it would be followed inside the root.
func (s *Service) resolve(path string) (string, error) {
	for range linksMax {
		full := filepath.Join(s.Root, path)
		target, err := os.Readlink(full)
		if err != nil {
			return full, nil
		}
		if target == os.DevNull {
			return target, nil
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		path = target
	}
	return "", fmt.Errorf("%s: too many links", path)
}

func noRight(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w; run this as root", err)
	}
	return err
}

func (s *Service) understand(unit string) error {
	texts := []string{unit}
	for _, path := range s.dropIns() {
		if filepath.Base(path) == dropInName {
			continue
		}
		text, err := s.read(path)
		if err != nil {
			return err
		}
		texts = append(texts, text)
		if settings, _ := parse(strings.NewReader(text)); filepath.Base(path) > dropInName && len(values(settings, "ExecStart")) > 0 {
			s.after = append(s.after, path)
		}
	}
	for _, text := range texts {
		settings, err := parse(strings.NewReader(text))
		if err != nil {
			return fmt.Errorf("%s: %w", s.Unit, err)
		}
		s.settings = append(s.settings, settings...)
	}
	s.User = last(s.settings, "User")
	_, s.Program, _ = splitCommand(last(s.settings, "ExecStart"))
	return nil
}

// dropIns of the unit, in the order in which systemd reads them: by name, and of one name the one that it prefers.
func (s *Service) dropIns() []string {
	byName := map[string]string{}
	for _, dir := range slices.Backward(unitDirs) {
		found, _ := filepath.Glob(filepath.Join(s.Root, dir, unitName+".d", "*.conf"))
		for _, path := range found {
			byName[filepath.Base(path)] = "/" + filepath.Join(dir, unitName+".d", filepath.Base(path))
		}
	}
	names := make([]string, 0, len(byName))
	for name := range byName {
		names = append(names, name)
	}
	slices.Sort(names)
	var paths []string
	for _, name := range names {
		paths = append(paths, byName[name])
	}
	return paths
}

// Generation says how the service's Ollama runs its models.
func (s *Service) Generation() string {
	if !filepath.IsAbs(s.Program) {
		return "unknown"
	}
	return generation(s.Program, s.resolve)
}

// Generation says how an Ollama runs its models: "current" (a llama-server for each), "embedded" (inside its own executable) or
// "unknown".
func Generation(program string) string { return generation(program, filepath.EvalSymlinks) }

func generation(program string, resolve func(string) (string, error)) string {
	path, err := resolve(program)
	if err != nil {
		return "unknown"
	}
	cause, err := watch.Diagnose(path)
	switch {
	case err != nil || cause == watch.Script:
		return "unknown"
	case cause == watch.EmbeddedEngine:
		return "embedded"
	}
	for _, server := range []string{"../lib/ollama/llama-server", "llama-server"} {
		real, err := resolve(filepath.Join(filepath.Dir(program), server))
		if err != nil {
			continue
		}
		if _, err := os.Stat(real); err == nil {
			return "current"
		}
	}
	return "unknown"
}

// shieldable says why the service's command cannot be put under `kvshield run`.
func (s *Service) shieldable() error {
	commands := values(s.settings, "ExecStart")
	if len(commands) != 1 {
		return fmt.Errorf("%s has %d commands in ExecStart=, where a service has one", s.Unit, len(commands))
	}
	prefix, program, command := splitCommand(commands[0])
	switch {
	case strings.Contains(prefix, ownArgZero):
		return fmt.Errorf("%s gives its program another name (ExecStart=@…), which cannot be passed on; start it without", s.Unit)
	case strings.HasPrefix(filepath.Base(program), "kvshield"):
		return fmt.Errorf("%s starts %s by itself; there is nothing to enable", s.Unit, filepath.Base(program))
	case slices.Contains(strings.Fields(command), ";"):
		return fmt.Errorf("%s has several commands in ExecStart=, where a service has one", s.Unit)
	case len(s.after) > 0:
		return fmt.Errorf("%s sets ExecStart= and is read after kvshield's drop-in; give it a name that comes before %s", s.after[0], dropInName)
	}
	if s.Generation() == "embedded" {
		return fmt.Errorf("%s: %w", s.Program, ErrEmbedded)
	}
	path, err := s.resolve(program)
	if err != nil {
		return err
	}
	if _, err := os.Stat(path); filepath.IsAbs(program) && err != nil {
		return fmt.Errorf("%s starts %s, which is not there: %w", s.Unit, program, err)
	}
	return s.sandboxed()
}

// sandboxed says which setting of the unit would keep kvshield from working.
func (s *Service) sandboxed() error {
	families := strings.Join(values(s.settings, "RestrictAddressFamilies"), " ")
	if families != "" && strings.HasPrefix(families, "~") == strings.Contains(families, "AF_UNIX") {
		return fmt.Errorf("RestrictAddressFamilies=%s keeps the engines from the enclave; add AF_UNIX to it with `systemctl edit ollama`", families)
	}
	return nil
}
