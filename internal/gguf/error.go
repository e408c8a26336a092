package gguf

import (
	"errors"
	"fmt"
)

// What can be wrong with a file. An [Error] wraps one of these, or what the operating system said.
var (
	ErrNotGGUF     = errors.New("not a GGUF file")
	ErrTruncated   = errors.New("GGUF file is cut short")
	ErrMalformed   = errors.New("malformed GGUF file")
	ErrUnsupported = errors.New("unsupported GGUF file")
)

// Error says what is wrong with a file, and where.
type Error struct {
	Offset int64  // byte of the file at which it was noticed
	What   string // names the key or tensor and what is wrong with it
	Err    error  // ErrNotGGUF, ErrTruncated, ErrMalformed, ErrUnsupported, or a failed read
}

func (e *Error) Error() string {
	return fmt.Sprintf("%v: %s (at byte %d)", e.Err, e.What, e.Offset)
}

func (e *Error) Unwrap() error { return e.Err }

func fail(kind error, offset int64, format string, args ...any) error {
	return &Error{Offset: offset, What: fmt.Sprintf(format, args...), Err: kind}
}

// within puts the name of the key or tensor in front of what a nested read found wrong.
func within(err error, format string, args ...any) error {
	if e, ok := errors.AsType[*Error](err); ok {
		return &Error{Offset: e.Offset, What: fmt.Sprintf(format, args...) + ": " + e.What, Err: e.Err}
	}
	return err
}
