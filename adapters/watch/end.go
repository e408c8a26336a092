package watch

import (
	"errors"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// errReplaced is a process that ended by itself; its number belongs to another one.
var errReplaced = errors.New("it ended by itself")

// end kills the process and reports it in the background, as finding out the cause takes a while.
func (w *Watcher) end(p *process, found finding) {
	program := linkTarget(p.path("exe"))
	if p.unreadable {
		program = p.commandName()
	}
	// Held open, for the file may be deleted as soon as the process is gone.
	exe, _ := os.Open(p.path("exe"))
	if exe == nil && p.unreadable {
		exe, _ = os.Open(program)
	}
	err := kill(p.pid, p.start)
	if errors.Is(err, errReplaced) {
		exe.Close() // a nil file refuses politely
		return
	}
	p.ended = true
	v := Violation{PID: p.pid, Program: program, Model: found.model.name, Evidence: found.evidence, Kill: err}
	suspects := p.suspects()
	hooked := p.hooked
	w.reports.Go(func() {
		if v.Cause = found.cause; v.Cause == Reachable {
			v.Cause = cause(exe, hooked, suspects)
		}
		for _, f := range append(suspects, exe) {
			f.Close()
		}
		w.report.Lock()
		defer w.report.Unlock()
		w.cfg.Violated(v)
	})
}

// suspects opens the libraries that may carry ggml, while the process is still there.
func (p *process) suspects() []*os.File {
	var files []*os.File
	for _, o := range p.objects {
		if isGGMLLibrary(o.path) {
			continue
		}
		if f, err := os.Open(p.objectFile(o)); err == nil {
			files = append(files, f)
		}
	}
	return files
}

// cause says why the hook did not reach a process of this program.
func cause(exe *os.File, hooked bool, libraries []*os.File) Cause {
	found := Reachable
	if exe != nil {
		found, _ = diagnose(exe)
	}
	if found == StaticProgram || !hooked && found == SetuidProgram {
		return found
	}
	if found == EmbeddedEngine {
		return found
	}
	for _, library := range libraries {
		if embedsGGML(library) {
			return EmbeddedEngine
		}
	}
	if !hooked {
		return CleanedEnvironment
	}
	return OtherEngine
}

// commandName is the program as the command line names it.
func (p *process) commandName() string {
	text, err := os.ReadFile(p.path("cmdline"))
	name, _, _ := strings.Cut(string(text), "\x00")
	if err != nil || name == "" {
		return "a program"
	}
	return name
}

// kill ends the process that has this number and start time, and no other. The pidfd is bound to
// whoever has the number when it is made, so the start time is compared afterwards.
func kill(pid int, start uint64) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return errReplaced
		}
		return err
	}
	defer unix.Close(fd)
	s, err := readStat(pid)
	if err != nil || s.start != start {
		return errReplaced
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return errReplaced
		}
		return err
	}
	return nil
}
