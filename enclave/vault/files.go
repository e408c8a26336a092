package vault

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/shield"
	"github.com/kvshield/kvshield/internal/gguf"
)

// sources are the opened files of a model.
type sources struct {
	files  []shield.File
	opened []*os.File
	before []fs.FileInfo
}

func openSources(paths []string) (*sources, error) {
	s := &sources{}
	for _, path := range paths {
		if err := s.open(path); err != nil {
			s.close()
			return nil, enclave.Invalid("%s: %v", filepath.Base(path), withoutPath(err))
		}
	}
	return s, nil
}

func (s *sources) open(path string) error {
	file, parsed, err := gguf.Open(path)
	if err != nil {
		return err
	}
	s.opened = append(s.opened, file)
	info, err := file.Stat()
	if err != nil {
		return err
	}
	s.before = append(s.before, info)
	s.files = append(s.files, shield.File{File: parsed, Name: filepath.Base(path), Data: file})
	return nil
}

// withoutPath leaves out the path that a nested error may start with: callers see base names only.
func withoutPath(err error) error {
	if bad, ok := errors.AsType[*gguf.Error](err); ok {
		return bad
	}
	if bad, ok := errors.AsType[*fs.PathError](err); ok {
		return bad.Err
	}
	return err
}

// unchanged fails when a source was written to while it was read.
func (s *sources) unchanged() error {
	for i, f := range s.opened {
		after, err := f.Stat()
		if err != nil || after.Size() != s.files[i].Size || !after.ModTime().Equal(s.before[i].ModTime()) {
			return enclave.Invalid("%s: the file was changed while it was read, load it again", s.files[i].Name)
		}
	}
	return nil
}

func (s *sources) close() {
	for _, f := range s.opened {
		f.Close()
	}
}

// readAt fills b from a source. A source that ends early has been cut after it was opened.
func readAt(f shield.File, b []byte, at int64) error {
	n, err := f.Data.ReadAt(b, at)
	switch {
	case n == len(b):
		return nil
	case errors.Is(err, io.EOF):
		return enclave.Invalid("%s: the file has become shorter while it was read", f.Name)
	}
	return enclave.Invalid("%s: reading it failed: %v", f.Name, withoutPath(err))
}

// readMarker returns the marker as it is in the model, or nil.
func readMarker(plan *shield.Plan, files []shield.File) ([]byte, error) {
	t := plan.Marker.Tensor
	if t.Size == 0 {
		return nil, nil
	}
	f := files[plan.Marker.File]
	raw := make([]byte, t.Size)
	if err := readAt(f, raw, f.DataOffset+t.Offset); err != nil {
		return nil, err
	}
	return raw, nil
}

// outputs are the opened files that receive a shielded model.
type outputs []*os.File

func openOutputs(paths []string, want int) (outputs, error) {
	if len(paths) != want {
		return nil, fmt.Errorf("%d outputs for a model of %d files: give one for each", len(paths), want)
	}
	var o outputs
	for i, path := range paths {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			o.close()
			return nil, fmt.Errorf("output %d cannot be opened: %w", i, withoutPath(err))
		}
		o = append(o, f)
		if err := o.checkLast(); err != nil {
			o.close()
			return nil, err
		}
	}
	return o, nil
}

// checkLast makes sure that the output opened last may be overwritten: it is no file with content,
// above all not a source, and no output was given twice.
func (o outputs) checkLast() error {
	last := len(o) - 1
	info, err := o[last].Stat()
	if err != nil {
		return fmt.Errorf("output %d cannot be examined: %w", last, withoutPath(err))
	}
	if !info.Mode().IsRegular() || info.Size() != 0 {
		return fmt.Errorf("output %d is not an empty file", last)
	}
	for i := range last {
		if other, err := o[i].Stat(); err != nil || os.SameFile(info, other) {
			return fmt.Errorf("outputs %d and %d are the same file", i, last)
		}
	}
	return nil
}

// empty takes back what was written.
func (o outputs) empty() error {
	var errs []error
	for i, f := range o {
		if err := f.Truncate(0); err != nil {
			errs = append(errs, fmt.Errorf("output %d cannot be emptied: %w", i, withoutPath(err)))
		}
	}
	return errors.Join(errs...)
}

func (o outputs) close() {
	for _, f := range o {
		f.Close()
	}
}
