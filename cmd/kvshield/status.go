package main

import (
	"context"
	"path/filepath"
	"runtime"
	"time"

	"github.com/kvshield/kvshield/adapters/supervisor"
)

// status is what /kvshield/status shows. It holds nothing of a request, and no key.
type status struct {
	Mode        string         `json:"mode"`
	Model       string         `json:"model,omitempty"`
	Health      health         `json:"health"`
	Enclave     *enclaveStatus `json:"enclave"` // null in mode off
	Transitions *transitions   `json:"transitions"`
	Ollama      *ollamaStatus  `json:"ollama,omitempty"`
	Keys        string         `json:"api_keys"` // none, apart, shared, or one (of a single tenant)
	Since       time.Time      `json:"since"`
	Goroutines  int            `json:"goroutines"` // of kvshield serve: more and more of them would be a leak
}

type health struct {
	Ready  bool   `json:"ready"`
	Reason string `json:"reason,omitempty"`
	Starts int64  `json:"engine_starts"`
}

type enclaveStatus struct {
	Backend   string `json:"backend"`
	Hardware  bool   `json:"hardware_protection"`
	Statement string `json:"statement"`
	Evidence  int    `json:"evidence_bytes"` // of a remote attestation; 0 without hardware
}

// transitions are totals of the run. The socket data plane counts none.
type transitions struct {
	Count    uint64 `json:"count"`
	Bytes    uint64 `json:"bytes"`
	Shielded int    `json:"models_shielded"`
	Refused  int    `json:"models_refused"`
	Fatal    int    `json:"engines_ended"`
}

const attestWithin = 2 * time.Second

func (h *host) status() any {
	s := status{Mode: h.flags.Mode, Keys: h.front.keys(), Since: h.since, Goroutines: runtime.NumGoroutine()}
	if h.flags.model != "" {
		s.Model = filepath.Base(h.flags.model)
	}
	st := h.state()
	s.Health = health{Ready: st.Ready, Reason: st.Reason, Starts: h.starts.Load()}
	s.Enclave, s.Transitions = shieldStatus(h.shield)
	if h.describe != nil {
		h.describe(&s)
	}
	return s
}

func shieldStatus(s *supervisor.Supervisor) (*enclaveStatus, *transitions) {
	if s == nil {
		return nil, nil
	}
	var a *enclaveStatus
	ctx, cancel := context.WithTimeout(context.Background(), attestWithin)
	defer cancel()
	if r, err := s.Attest(ctx, nil); err == nil {
		a = &enclaveStatus{Backend: r.Backend, Hardware: r.Hardware, Statement: r.Statement, Evidence: len(r.Evidence)}
	}
	e := s.Events()
	n := s.Totals()
	return a, &transitions{Count: n.Transitions, Bytes: n.Bytes, Shielded: e.Shielded, Refused: len(e.Refusals), Fatal: len(e.Fatal)}
}

func (f *front) keys() string {
	switch {
	case f.config.Keys == nil:
		return "none"
	case f.alone:
		return "one"
	case f.tenants == nil:
		return "shared"
	}
	return "apart"
}
