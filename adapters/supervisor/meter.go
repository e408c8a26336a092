package supervisor

import (
	"os"

	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/hooks/session"
)

// counted is what the hooks of a run have counted, under the supervisor's lock.
type counted struct {
	past   meter.Totals  // of engines that are gone
	graphs []meter.Graph // of theirs, not handed out yet
	read   bool          // somebody asks for graphs
	detail bool
}

// maxGraphs of engines that are gone are kept.
const maxGraphs = 1 << 14

var _ session.Metered = (*Supervisor)(nil)

// Meter implements session.Metered.
func (s *Supervisor) Meter(p *session.Peer) *os.File {
	if s.cfg.Observe {
		return nil
	}
	f, err := meter.Create()
	var m *meter.Meter
	if err == nil {
		m, err = meter.Map(f)
	}
	if err != nil {
		s.cfg.Log.Warn("what an engine's transitions cost is not counted", "pid", p.PID, "error", err)
		if f != nil {
			f.Close()
		}
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.engines[p]; e != nil {
		m.Detail(s.counted.detail)
		e.meter = m
		return f
	}
	m.Close()
	f.Close()
	return nil
}

// closeMeter keeps what a gone engine had counted.
func (s *Supervisor) closeMeter(e *engine) {
	if e.meter == nil {
		return
	}
	if s.counted.read {
		s.counted.graphs = append(s.counted.graphs, e.graphs()...)
		if beyond := len(s.counted.graphs) - maxGraphs; beyond > 0 {
			s.counted.graphs = s.counted.graphs[beyond:]
			s.counted.past.Lost += uint64(beyond)
		}
	}
	s.counted.past.Add(e.meter.Totals())
	if err := e.meter.Close(); err != nil {
		s.cfg.Log.Debug("an engine's meter could not be released", "error", err)
	}
	e.meter = nil
}

func (e *engine) graphs() []meter.Graph {
	list := e.meter.Graphs()
	for i := range list {
		list[i].PID = e.pid
	}
	return list
}

// Totals of all engines of this run together.
func (s *Supervisor) Totals() meter.Totals {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := s.counted.past
	for _, e := range s.engines {
		if e.meter != nil {
			sum.Add(e.meter.Totals())
		}
	}
	return sum
}

// Graphs that were computed since the last call, those of one engine in the order of their ends. There may be one reader.
func (s *Supervisor) Graphs() []meter.Graph {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counted.read = true
	list := s.counted.graphs
	s.counted.graphs = nil
	for _, e := range s.engines {
		if e.meter != nil {
			list = append(list, e.graphs()...)
		}
	}
	return list
}

// Layers are the totals of each layer over the engines that run.
func (s *Supervisor) Layers() []meter.Layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	var sum []meter.Layer
	for _, e := range s.engines {
		if e.meter == nil {
			continue
		}
		for i, l := range e.meter.Layers() {
			if i == len(sum) {
				sum = append(sum, meter.Layer{})
			}
			sum[i].Add(l)
		}
	}
	return sum
}

// Detail has the hooks tell of each transition of a graph from now on, or only of graphs.
func (s *Supervisor) Detail(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counted.detail = on
	for _, e := range s.engines {
		if e.meter != nil {
			e.meter.Detail(on)
		}
	}
}
