package service

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// RuntimeName is the service's folder below /run, in which the run keeps its sockets and says what it shields.
const RuntimeName = "kvshield-ollama"

const (
	headLine   = "# Written by `kvshield ollama enable`. Changed by hand, it is left alone; `kvshield ollama disable` takes it back."
	digestMark = "# digest: "
	folderMark = "# folder: "
	folderMade = "made"
	folderOld  = "was there"
)

// ErrForeign is a drop-in of our name that was written or changed by somebody else.
var ErrForeign = errors.New("was not written by `kvshield ollama enable`, or was changed since; remove it by hand if it is not needed")

// Options of [Service.Enable].
type Options struct {
	Command string // of kvshield, as the service is to find it
	Mode    string // resident or permute
}

// Change is what Enable or Disable did, or would do.
type Change struct {
	Path    string // of the drop-in, below the root
	Text    string // its content; empty when it is removed
	Written bool   // false when all is as it should be already
}

func (s *Service) dropInDir() string { return filepath.Join(s.Root, configDir, unitName+".d") }

func (s *Service) dropIn() string { return filepath.Join(s.dropInDir(), dropInName) }

// shield is the drop-in without its head.
func (s *Service) shield(o Options) string {
	prefix, _, command := splitCommand(last(s.settings, "ExecStart"))
	var b strings.Builder
	b.WriteString("[Service]\nExecStart=\n")
	fmt.Fprintf(&b, "ExecStart=%s%s run --mode %s --runtime-dir %%t/%s -- %s\n", prefix, quote(o.Command), o.Mode, RuntimeName, command)
	fmt.Fprintf(&b, "RuntimeDirectory=%s\nRuntimeDirectoryMode=0700\n", RuntimeName)
	b.WriteString("# The enclave locks the conversations' keys and values in memory.\nLimitMEMLOCK=infinity\n")
	b.WriteString("# Ollama ends first, then what protects it.\nKillMode=mixed\n")
	if strings.HasPrefix(last(s.settings, "Type"), "notify") {
		b.WriteString("NotifyAccess=all\n")
	}
	return b.String()
}

func withHead(folder, body string) string {
	return fmt.Sprintf("%s\n%s%x\n%s%s\n%s", headLine, digestMark, sha256.Sum256([]byte(folder+"\n"+body)), folderMark, folder, body)
}

// ours takes a drop-in apart that this package wrote; false for any other text.
func ours(text string) (folder, body string, ok bool) {
	lines := strings.SplitN(text, "\n", 4)
	if len(lines) < 4 {
		return "", "", false
	}
	folder, ok = strings.CutPrefix(lines[2], folderMark)
	return folder, lines[3], ok && text == withHead(folder, lines[3])
}

// existing returns our drop-in as it lies there, empty where there is none.
func (s *Service) existing() (string, error) {
	text, err := os.ReadFile(s.dropIn())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	case err != nil:
		return "", noRight(err)
	}
	if _, _, ok := ours(string(text)); !ok {
		return "", fmt.Errorf("%s %w", s.dropIn(), ErrForeign)
	}
	return string(text), nil
}

// Enable writes the drop-in; with dry it only says what it would write. Enabled already, it does nothing.
func (s *Service) Enable(o Options, dry bool) (Change, error) {
	c := Change{Path: s.dropIn()}
	if err := s.shieldable(); err != nil {
		return c, err
	}
	if err := s.inside(); err != nil {
		return c, err
	}
	old, err := s.existing()
	if err != nil {
		return c, err
	}
	folder := folderOld
	if !isDir(s.dropInDir()) {
		folder = folderMade
	} else if was, _, ok := ours(old); ok {
		folder = was
	}
	c.Text = withHead(folder, s.shield(o))
	c.Written = c.Text != old
	if dry || !c.Written {
		return c, nil
	}
	if err := os.MkdirAll(s.dropInDir(), 0o755); err != nil {
		return c, noRight(err)
	}
	return c, noRight(writeWhole(c.Path, c.Text))
}

// writeWhole leaves the old file or the new one, never a part.
func writeWhole(path, text string) error {
	part := path + ".new" // systemd reads *.conf only
	if err := os.WriteFile(part, []byte(text), 0o644); err != nil {
		return err
	}
	if err := os.Rename(part, path); err != nil {
		os.Remove(part)
		return err
	}
	return nil
}

// Disable removes the drop-in, and its folder where Enable made that and nothing else is in it.
func (s *Service) Disable(dry bool) (Change, error) {
	c := Change{Path: s.dropIn()}
	if err := s.inside(); err != nil {
		return c, err
	}
	old, err := s.existing()
	if err != nil || old == "" {
		return c, err
	}
	c.Written = true
	if dry {
		return c, nil
	}
	if err := os.Remove(c.Path); err != nil {
		return c, noRight(err)
	}
	if folder, _, _ := ours(old); folder == folderMade {
		_ = os.Remove(s.dropInDir()) // another drop-in in it keeps it
	}
	return c, nil
}

// inside refuses a folder that a link leads out of the root: a scratch root must not change the machine.
func (s *Service) inside() error {
	root, err := filepath.EvalSymlinks(s.Root)
	if err != nil {
		return err
	}
	for _, dir := range []string{s.dropInDir(), filepath.Dir(s.dropInDir())} {
		real, err := filepath.EvalSymlinks(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return noRight(err)
		}
		if rel, err := filepath.Rel(root, real); err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
			return fmt.Errorf("%s leads out of %s", dir, s.Root)
		}
	}
	return nil
}
