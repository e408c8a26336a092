package memory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
)

// maxHits bounds the memory that a process full of rows can make a search take: 64 MiB.
const maxHits = 2 << 20

// What can go wrong with a process. The error says what to do. ErrPermission and ErrEnded are kinds of ErrProcess.
var (
	ErrProcess    = errors.New("cannot read the process's memory")
	ErrPermission = fmt.Errorf("%w: %w", ErrProcess, fs.ErrPermission)
	ErrEnded      = fmt.Errorf("%w: it has ended", ErrProcess)
)

// Found is what a search of a process found, and how much of its memory that covers. Sizes are in bytes.
type Found struct {
	Hits    []Hit // in ascending order of addresses
	Read    uint64
	Empty   uint64 // never touched by the process: nothing to read
	Holes   uint64 // within what was to be read, but could not be
	Skipped uint64 // not to be read: no read permission, files only read, the kernel's pages
}

// Process is [Scanner.Search] for those who need no figures.
func (s *Scanner) Process(ctx context.Context, pid int) ([]Hit, error) {
	found, err := s.Search(ctx, pid, nil)
	return found.Hits, err
}

// Search looks through all memory of a process that may hold a cache. progress, unless nil, is called now and then with the bytes
// done and the bytes there are. The result is never nil; with an error it holds what was found until then, which proves nothing about the rest. The
// process goes on running meanwhile: what it moves may be missed, or found twice.
func (s *Scanner) Search(ctx context.Context, pid int, progress func(done, total uint64)) (*Found, error) {
	found := &Found{}
	p, err := open(pid)
	if err != nil {
		return found, err
	}
	defer p.close()
	found.Skipped = p.skipped
	err = s.scan(ctx, p.source, p.spans, func(hits []Hit, n counted) error {
		found.Read += n.read
		found.Empty += n.empty
		found.Holes += n.holes
		if len(found.Hits)+len(hits) > maxHits {
			return fmt.Errorf("%w: it holds more than %d rows of the dictionary", ErrProcess, maxHits)
		}
		found.Hits = append(found.Hits, hits...)
		if progress != nil {
			progress(found.Read+found.Empty+found.Holes, p.total)
		}
		return nil
	})
	// The kernel answers with an end of file when the memory's owner is gone.
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ESRCH) {
		err = ended(pid)
	}
	return found, err
}

// process is a process opened for reading.
type process struct {
	source
	files          []*os.File
	spans          []span
	total, skipped uint64 // bytes in spans, and elsewhere
}

func (p *process) close() {
	for _, f := range p.files {
		f.Close()
	}
}

// open opens a process's memory and lists what to read of it. All belongs to the same process, even if its number is given to another.
func open(pid int) (*process, error) {
	dir, err := os.OpenRoot(fmt.Sprintf("/proc/%d", pid))
	if err != nil {
		return nil, explain(pid, err)
	}
	defer dir.Close()
	p := &process{}
	if err := p.open(dir); err != nil {
		p.close()
		return nil, explain(pid, err)
	}
	return p, nil
}

func (p *process) open(dir *os.Root) error {
	memory, err := dir.Open("mem")
	if err != nil {
		return err
	}
	p.files, p.source = append(p.files, memory), source{ReaderAt: memory}
	maps, err := dir.Open("maps")
	if err != nil {
		return err
	}
	defer maps.Close()
	mappings, err := parseMaps(maps)
	if err == nil && len(mappings) == 0 {
		err = syscall.ESRCH
	}
	// A kernel without it costs time, nothing else.
	if f, err := dir.Open("pagemap"); err == nil {
		p.files = append(p.files, f)
		p.absent = pagemap{f, uint64(os.Getpagesize())}.absent
	}
	p.spans, p.total, p.skipped = choose(mappings)
	return err
}

func explain(pid int, err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: process %d: %s", ErrPermission, pid, remedy())
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ESRCH):
		return ended(pid)
	}
	return fmt.Errorf("%w: process %d: %w", ErrProcess, pid, err)
}

func ended(pid int) error {
	return fmt.Errorf("%w: process %d: keep it running until the search is done", ErrEnded, pid)
}

// remedy says who may read a process's memory: ptrace(2), "Ptrace access mode checking", and its section on Yama.
func remedy() string {
	setting, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope")
	scope := strings.TrimSpace(string(setting))
	switch {
	case err != nil || scope == "0":
		return "run as the user of that process, or as root"
	case scope == "3":
		return "kernel.yama.ptrace_scope is 3, which forbids it to everybody until the machine is restarted with another setting"
	}
	return "run as root, or as the user of that process after `sysctl kernel.yama.ptrace_scope=0` (it is " + scope + ")"
}
