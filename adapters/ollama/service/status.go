package service

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"

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
	How  string `json:"how"` // resident, permuted, or passed: it keeps nothing
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
			st.Models = append(st.Models, Model{nameOf(m.Path), m.Path, m.How, e.PID})
		}
	}
}

const manifestMax = 1 << 20

// nameOf finds the name under which Ollama keeps a blob: its manifests lie beside the folder of the blobs.
func nameOf(blob string) string {
	dir, file := filepath.Split(blob)
	if filepath.Base(dir) != "blobs" {
		return ""
	}
	manifests, _ := filepath.Glob(filepath.Join(filepath.Dir(filepath.Clean(dir)), "manifests", "*", "*", "*", "*"))
	for _, path := range manifests {
		if has(path, strings.Replace(file, "-", ":", 1)) {
			return displayed(path)
		}
	}
	return ""
}

func has(manifest, digest string) bool {
	if info, err := os.Stat(manifest); err != nil || !info.Mode().IsRegular() || info.Size() > manifestMax {
		return false
	}
	text, err := os.ReadFile(manifest)
	var m struct {
		Layers []struct{ Digest string }
	}
	if err != nil || json.Unmarshal(text, &m) != nil {
		return false
	}
	for _, l := range m.Layers {
		if l.Digest == digest {
			return true
		}
	}
	return false
}

// displayed is the name as Ollama prints it: host and namespace only where they are not the usual ones.
func displayed(manifest string) string {
	parts := strings.Split(manifest, "/")
	host, namespace, model, tag := parts[len(parts)-4], parts[len(parts)-3], parts[len(parts)-2], parts[len(parts)-1]
	name := model + ":" + tag
	if namespace != "library" {
		name = namespace + "/" + name
	}
	if host != "registry.ollama.ai" {
		name = host + "/" + namespace + "/" + model + ":" + tag
	}
	return name
}
