package service

import (
	"path/filepath"

	"github.com/kvshield/kvshield/adapters/ollama/store"
	"github.com/kvshield/kvshield/adapters/supervisor"
)

// Status of the service, as far as files and this machine's systemd tell.
type Status struct {
	Unit       string  `json:"unit"`
	Program    string  `json:"program"`
	Generation string  `json:"generation"` // current, embedded or unknown
	Enabled    bool    `json:"enabled"`
	DropIn     string  `json:"drop_in,omitempty"`
	Warning    string  `json:"warning,omitempty"`
	Running    bool    `json:"running"`
	Shielded   bool    `json:"shielded"` // what runs now, whatever is enabled
	Mode       string  `json:"mode,omitempty"`
	TEE        string  `json:"tee,omitempty"`
	Hardware   bool    `json:"hardware_protection"`
	Models     []Model `json:"models"`
}

// Model that an engine of the running service has opened.
type Model struct {
	Name string `json:"name,omitempty"` // as Ollama calls it, where its manifests tell
	Path string `json:"path"`
	How  string `json:"how"` // resident, permuted, passed (it keeps nothing), or clear
	PID  int    `json:"pid"`
}

// Status says whether the service is enabled, and what shields it now. A service that runs under `kvshield run` without
// being a systemd service is found as well.
func (s *Service) Status() Status {
	st := Status{Unit: s.Unit, Program: s.Program, Generation: s.Generation(), Models: []Model{}}
	if text, err := s.existing(); err != nil {
		st.Warning = err.Error()
	} else if text != "" {
		st.Enabled, st.DropIn = true, s.dropIn()
		if len(s.after) > 0 {
			st.Warning = s.after[0] + " sets ExecStart= after kvshield's drop-in, which has no effect"
		}
	}
	runs := supervisor.ReadStatuses(filepath.Join(s.Root, "run", RuntimeName))
	if s.Root == "/" {
		pid := Running()
		st.Running = pid != 0
		if len(runs) == 0 {
			runs = others(pid)
		}
	}
	if len(runs) > 0 {
		st.describe(runs[0])
	}
	return st
}

// others finds runs that were not started by our drop-in: the main process of the service itself, or else one of `ollama`.
func others(pid int) []supervisor.Status {
	var found []supervisor.Status
	for _, base := range supervisor.RuntimeBases() {
		for _, run := range supervisor.ReadStatuses(base) {
			if pid == run.PID || pid == 0 && filepath.Base(run.Program) == "ollama" {
				found = append(found, run)
			}
		}
	}
	return found
}

func (st *Status) describe(run supervisor.Status) {
	st.Running, st.Shielded = true, run.Mode != "off"
	st.Mode, st.TEE, st.Hardware = run.Mode, run.TEE, run.Hardware
	for _, e := range run.Engines {
		for _, m := range e.Models {
			st.Models = append(st.Models, Model{store.Name(m.Path), m.Path, m.How, e.PID})
		}
	}
}
