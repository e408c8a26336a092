// Package llamacpp finds, starts and watches stock llama.cpp programs.
//
// [Find] locates a program; [StartServer] launches a llama-server on a Unix socket that only its starter can open.
// The preload build of the hook is in the preload folder.
package llamacpp

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// PrivateEngine is the folder that `make engine` fills, relative to the repository.
const PrivateEngine = ".engine/bin"

// NotFoundError is a program that is neither installed nor in the private engine.
type NotFoundError struct{ Program string }

func (e *NotFoundError) Error() string {
	return fmt.Sprintf("%s is not installed; run `make engine` in the kvshield repository for a private one, install llama.cpp, or name it by its path",
		e.Program)
}

// Find returns the path of a program: as given when it names a path, else from PATH, else from the private engine
// below the working directory or beside this executable.
func Find(program string) (string, error) {
	if strings.ContainsRune(program, '/') {
		return findPath(program)
	}
	if path, err := exec.LookPath(program); err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range privateFolders() {
		path := filepath.Join(dir, program)
		if info, err := os.Stat(path); err == nil && !info.IsDir() && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", &NotFoundError{program}
}

func findPath(program string) (string, error) {
	info, err := os.Stat(program)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", &NotFoundError{program}
	case err != nil:
		return "", err
	case info.IsDir():
		return "", fmt.Errorf("%s is a directory; name the program in it", program)
	case info.Mode()&0o111 == 0:
		return "", fmt.Errorf("%s is not executable (mode %v)", program, info.Mode())
	}
	return filepath.Abs(program)
}

func privateFolders() []string {
	var dirs []string
	if wd, err := os.Getwd(); err == nil {
		dirs = append(dirs, filepath.Join(wd, PrivateEngine))
	}
	if exe, err := os.Executable(); err == nil {
		dirs = append(dirs, filepath.Join(filepath.Dir(exe), "..", PrivateEngine))
	}
	return dirs
}
