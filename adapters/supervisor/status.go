package supervisor

import (
	"cmp"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/hooks/session"
)

const (
	statusName   = "status.json"
	statusMax    = 4 << 20
	attestWithin = 5 * time.Second
)

// Status is what a run says of itself to whoever may read its runtime directory, for information: an engine of the same user
// could write there too.
type Status struct {
	PID      int            `json:"pid"` // of the process that has the supervisor
	Program  string         `json:"program"`
	Mode     string         `json:"mode"`
	TEE      string         `json:"tee"` // empty until an enclave has said so
	Hardware bool           `json:"hardware_protection"`
	Engines  []EngineStatus `json:"engines"`
}

// EngineStatus is one engine process.
type EngineStatus struct {
	PID    int           `json:"pid"`
	Models []ModelStatus `json:"models"`
}

// ModelStatus is one file that an engine opened as a model.
type ModelStatus struct {
	Path string `json:"path"` // as the engine named it
	How  string `json:"how"`  // permuted, resident, passed (it keeps nothing), or clear
}

func how(o session.Opened) string {
	switch {
	case o.Shield:
		return "permuted"
	case o.Reside:
		return "resident"
	case o.Clear:
		return "clear"
	}
	return "passed"
}

// attestOnce notes what protects the enclave. An enclave that does not say so now is asked by whoever needs to know.
func (s *Supervisor) attestOnce() {
	ctx, cancel := context.WithTimeout(s.ctx, attestWithin)
	defer cancel()
	report, err := s.Attest(ctx, nil)
	if err != nil {
		s.cfg.Log.Debug("the enclave did not say what protects it", "error", err)
	}
	s.mu.Lock()
	s.report = report
	s.mu.Unlock()
	s.writeStatus()
}

// Status of this run.
func (s *Supervisor) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{PID: os.Getpid(), Program: s.cfg.Program, Mode: "permute", TEE: s.report.Backend, Hardware: s.report.Hardware, Engines: []EngineStatus{}}
	switch {
	case s.cfg.Observe:
		st.Mode = "off"
	case s.cfg.Resident:
		st.Mode = "resident"
	}
	for p, e := range s.engines {
		st.Engines = append(st.Engines, EngineStatus{p.PID, slices.Compact(slices.Clone(e.models))})
	}
	slices.SortFunc(st.Engines, func(a, b EngineStatus) int { return cmp.Compare(a.PID, b.PID) })
	return st
}

// writeStatus replaces the status file. A run whose status cannot be written is shielded all the same.
func (s *Supervisor) writeStatus() {
	s.status.Lock()
	defer s.status.Unlock()
	text, err := json.Marshal(s.Status())
	part := s.dir.Path(statusName + ".new")
	if err == nil {
		err = os.WriteFile(part, text, 0o600)
	}
	if err == nil {
		err = os.Rename(part, s.dir.Path(statusName))
	}
	if err != nil {
		s.cfg.Log.Debug("the status could not be written", "error", err)
	}
}

// ReadStatuses returns what the runs say of themselves that have their runtime directories below base and are alive. Runs whose
// directories the caller may not read are left out.
func ReadStatuses(base string) []Status {
	var list []Status
	dirs, _ := filepath.Glob(filepath.Join(base, dirPrefix+"*"))
	for _, dir := range dirs {
		if st, ok := readStatus(dir); ok && isHeld(dir) {
			list = append(list, st)
		}
	}
	return list
}

func readStatus(dir string) (Status, bool) {
	var st Status
	f, err := openPlain(filepath.Join(dir, statusName))
	if err != nil {
		return st, false
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, statusMax))
	return st, err == nil && json.Unmarshal(text, &st) == nil
}

// isHeld says whether a live run has the directory's lock.
func isHeld(dir string) bool {
	f, err := openPlain(filepath.Join(dir, lockName))
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil
}

// openPlain opens what another user may have put there: no link, and nothing that blocks.
func openPlain(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}
