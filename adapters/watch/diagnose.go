package watch

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotProgram is a file that is neither an ELF program nor a script.
var ErrNotProgram = errors.New("neither an ELF program nor a script")

// Diagnose says whether the hook will reach a program, and if not why. It looks at this file only:
// a program that loads a library with ggml inside, as some Node bindings do, is Reachable.
func Diagnose(exe string) (Cause, error) {
	f, err := os.Open(exe)
	if err != nil {
		return Reachable, err
	}
	defer f.Close()
	cause, err := diagnose(f)
	if err != nil {
		return Reachable, fmt.Errorf("%s: %w", exe, err)
	}
	return cause, nil
}

func diagnose(f *os.File) (Cause, error) {
	var start [2]byte
	if _, err := f.ReadAt(start[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return Reachable, err
	}
	if string(start[:]) == "#!" {
		return Script, nil
	}
	program, err := elf.NewFile(f)
	if err != nil {
		return Reachable, ErrNotProgram
	}
	switch {
	case !hasInterpreter(program):
		return StaticProgram, nil
	case privileged(f):
		return SetuidProgram, nil
	case embedsGGML(f):
		return EmbeddedEngine, nil
	}
	return Reachable, nil
}

func hasInterpreter(program *elf.File) bool {
	for _, p := range program.Progs {
		if p.Type == elf.PT_INTERP {
			return true
		}
	}
	return false
}

func privileged(f *os.File) bool {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) == nil && st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
		return true
	}
	n, err := unix.Fgetxattr(int(f.Fd()), "security.capability", nil)
	return err == nil && n > 0
}

// ggmlMarks are strings of ggml's own code that survive stripping: its log and error messages.
var ggmlMarks = [][]byte{
	[]byte("gguf_init_from_file"),
	[]byte("not enough space in the context's memory pool"),
}

// embedsGGML says whether ggml's code is inside a program or library, rather than in shared
// libraries that it is linked with (a user of those mentions ggml's functions too).
func embedsGGML(r io.ReaderAt) bool {
	program, err := elf.NewFile(r)
	if err != nil {
		return false
	}
	needed, _ := program.ImportedLibraries()
	for _, name := range needed {
		if isGGMLLibrary(name) {
			return false
		}
	}
	return contains(io.NewSectionReader(r, 0, 1<<62), ggmlMarks)
}

// isGGMLLibrary knows the shared libraries of llama.cpp by name.
func isGGMLLibrary(path string) bool {
	name := path[strings.LastIndexByte(path, '/')+1:]
	return strings.HasPrefix(name, "libggml") || strings.HasPrefix(name, "libllama")
}

func contains(r io.Reader, marks [][]byte) bool {
	const longest = 64
	buf := make([]byte, 256<<10)
	kept := 0
	for {
		n, err := r.Read(buf[kept:])
		text := buf[:kept+n]
		for _, mark := range marks {
			if bytes.Contains(text, mark) {
				return true
			}
		}
		if err != nil || n == 0 {
			return false
		}
		// A mark may lie across two blocks.
		kept = copy(buf, text[max(0, len(text)-longest):])
	}
}
