package gguf

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// Open opens a regular file and parses it. The path is in every error.
func Open(path string) (*os.File, *File, error) {
	// Opening a FIFO would wait for a writer without O_NONBLOCK, before it can be told from a file.
	r, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	f, err := parseRegular(r)
	if err != nil {
		r.Close()
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, f, nil
}

func parseRegular(r *os.File) (*File, error) {
	info, err := r.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fail(ErrNotGGUF, 0, "it is %s, not a regular file", describe(info.Mode()))
	}
	return Parse(r, info.Size())
}

func describe(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "a directory"
	case mode&fs.ModeNamedPipe != 0:
		return "a FIFO"
	case mode&fs.ModeDevice != 0:
		return "a device"
	case mode&fs.ModeSocket != 0:
		return "a socket"
	}
	return "a special file"
}
