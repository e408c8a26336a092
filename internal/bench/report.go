package bench

import (
	"slices"
	"time"

	"github.com/kvshield/kvshield/hooks/meter"
)

// Version of the JSON structure. It grows when a field changes its meaning or goes; new fields leave it as it is.
const Version = 1

// Report is the outcome of a run. As JSON it is described in docs/bench.md.
type Report struct {
	Version   int    `json:"version"`
	Mode      string `json:"mode"`
	DataPlane string `json:"data_plane,omitempty"` // empty in mode off
	Runs      int    `json:"runs"`                 // pairs per phase
	Model     Model  `json:"model"`
	Engine    Engine `json:"engine"`

	Prefill Speed      `json:"prefill"`
	Decode  Speed      `json:"decode"`
	Load    Comparison `json:"load_seconds"`
	Memory  Memory     `json:"memory"`
	Curve   *Curve     `json:"curve,omitempty"` // over context length, where depths were asked for

	Predictions []time.Duration `json:"-"` // for the table
}

// Model that was measured, as llama-bench describes it.
type Model struct {
	Path       string `json:"path"`
	Type       string `json:"type"`
	Bytes      int64  `json:"bytes"` // of its tensors
	Parameters int64  `json:"parameters"`
}

// Engine that was measured, as llama-bench describes itself and the machine.
type Engine struct {
	Build    string `json:"build"`
	Number   int    `json:"build_number"`
	Backends string `json:"backends"`
	CPU      string `json:"cpu"`
	GPU      string `json:"gpu,omitempty"`
	Threads  int    `json:"threads"`
}

// Speed of one kind of work.
type Speed struct {
	Tokens      int         `json:"tokens"`            // per measurement
	PerSecond   Comparison  `json:"tokens_per_second"` // higher is better
	Transitions Transitions `json:"transitions"`       // of the shielded side
}

// Comparison of the two sides over all pairs.
type Comparison struct {
	Stock    Spread `json:"stock"`
	Shielded Spread `json:"shielded"`
	Ratio    Spread `json:"ratio"` // shielded / stock, pair by pair
}

// Spread of a figure over the pairs.
type Spread struct {
	Median  float64   `json:"median"`
	Min     float64   `json:"min"`
	Max     float64   `json:"max"`
	Samples []float64 `json:"samples"` // in the order in which they were taken
}

// Transitions of all measurements of a phase together, llama-bench's own warm-up included. Everything is zero where
// nothing is counted: in mode off, and with the socket data plane.
type Transitions struct {
	Count uint64  `json:"count"`
	Bytes float64 `json:"mean_bytes"` // of rows, one way
	Mean  float64 `json:"mean_microseconds"`
	P50   float64 `json:"p50_microseconds"` // quantiles are rounded up, by at most 12.5 %
	P99   float64 `json:"p99_microseconds"`
}

// Memory at its highest.
type Memory struct {
	Peak Comparison `json:"peak_bytes"` // the copy included
	Copy Spread     `json:"copy_bytes"` // the shielded model in memory
	// Beyond is shielded - copy - stock, pair by pair. It is negative where the stock engine has its model
	// file mapped, which counts, and the shielded engine has the copy in its place.
	Beyond   Spread      `json:"beyond_copy_bytes"`
	Stock    MemoryParts `json:"stock_parts"` // parts are those of the highest peak
	Shielded MemoryParts `json:"shielded_parts"`
	// Resident says that a process hid its proportional set size and its whole resident set was counted instead.
	Resident bool `json:"resident_set_counted"`
}

// MemoryParts are who holds a peak, in bytes.
type MemoryParts struct {
	Engine     int64 `json:"engine"`
	Enclave    int64 `json:"enclave"`
	Supervisor int64 `json:"supervisor"`
	Copy       int64 `json:"copy"`
	Files      int64 `json:"mapped_files"` // part of the first three: page cache that the kernel can take back
}

func (c *Config) report(m *measurements) *Report {
	last := m.decode[len(m.decode)-1].stock.result
	r := &Report{Version: Version, Mode: c.Mode, Runs: c.Runs,
		Model:   Model{c.Model, last.ModelType, last.ModelBytes, last.Parameters},
		Engine:  Engine{last.BuildCommit, last.BuildNumber, last.Backends, last.CPU, last.GPU, last.Threads},
		Prefill: speedOf(m.prefill, c.Prompt), Decode: speedOf(m.decode, c.Generate),
		Load:   compare(m.load, func(l loading) float64 { return l.seconds }),
		Memory: memoryOf(m.memory),
	}
	if c.NewShield != nil {
		r.DataPlane = c.DataPlane
	}
	return r
}

func speedOf(pairs []pair[speed], tokens int) Speed {
	var sum meter.Totals
	for _, p := range pairs {
		sum.Add(p.shielded.transitions)
	}
	return Speed{Tokens: tokens, Transitions: transitionsOf(sum),
		PerSecond: compare(pairs, func(s speed) float64 { return s.PerSecond })}
}

func transitionsOf(s meter.Totals) Transitions {
	if s.Transitions == 0 {
		return Transitions{}
	}
	n := float64(s.Transitions)
	return Transitions{Count: s.Transitions, Bytes: float64(s.Bytes) / n, Mean: micros(s.Wait) / n,
		P50: micros(s.Quantile(0.50)), P99: micros(s.Quantile(0.99))}
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

func memoryOf(pairs []pair[memory]) Memory {
	m := Memory{Peak: compare(pairs, func(m memory) float64 { return float64(m.total()) })}
	var copies, beyond []float64
	var stock, shielded memory
	for _, p := range pairs {
		copies = append(copies, float64(p.shielded.copy))
		beyond = append(beyond, float64(p.shielded.total()-p.shielded.copy-p.stock.total()))
		stock, shielded = higher(stock, p.stock), higher(shielded, p.shielded)
		m.Resident = m.Resident || p.stock.resident || p.shielded.resident
	}
	m.Copy, m.Beyond = spread(copies), spread(beyond)
	m.Stock, m.Shielded = stock.parts(), shielded.parts()
	return m
}

func higher(a, b memory) memory {
	if b.total() > a.total() {
		return b
	}
	return a
}

func (m memory) parts() MemoryParts {
	return MemoryParts{m.engine, m.enclave, m.supervisor, m.copy, m.files}
}

func compare[T any](pairs []pair[T], figure func(T) float64) Comparison {
	var stock, shielded, ratio []float64
	for _, p := range pairs {
		a, b := figure(p.stock), figure(p.shielded)
		stock, shielded = append(stock, a), append(shielded, b)
		if a > 0 { // a ratio to nothing would not even be a number
			ratio = append(ratio, b/a)
		}
	}
	return Comparison{spread(stock), spread(shielded), spread(ratio)}
}

func spread(samples []float64) Spread {
	if len(samples) == 0 {
		return Spread{Samples: []float64{}}
	}
	sorted := slices.Sorted(slices.Values(samples))
	n := len(sorted)
	return Spread{Median: (sorted[(n-1)/2] + sorted[n/2]) / 2, Min: sorted[0], Max: sorted[n-1], Samples: samples}
}
