package bench

import (
	"bytes"
	"encoding/json"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/hooks/meter"
)

func TestSpread(t *testing.T) {
	for name, c := range map[string]struct {
		samples          []float64
		median, min, max float64
	}{
		"none": {nil, 0, 0, 0},
		"one":  {[]float64{3}, 3, 3, 3},
		"odd":  {[]float64{9, 1, 2}, 2, 1, 9},
		"even": {[]float64{4, 1, 3, 100}, 3.5, 1, 100},
	} {
		t.Run(name, func(t *testing.T) {
			got := spread(c.samples)
			if got.Median != c.median || got.Min != c.min || got.Max != c.max {
				t.Errorf("got %+v", got)
			}
			if !slices.Equal(got.Samples, c.samples) {
				t.Errorf("samples %v are not in the order taken, %v", got.Samples, c.samples)
			}
		})
	}
}

func TestCompareTakesRatiosPairByPair(t *testing.T) {
	// The machine got slower by half in the second pair: both ratios are one half, the ratio of medians is not.
	pairs := []pair[float64]{{100, 50}, {50, 25}, {1000, 500}}
	c := compare(pairs, func(f float64) float64 { return f })
	if c.Ratio.Median != 0.5 || c.Ratio.Min != 0.5 || c.Ratio.Max != 0.5 {
		t.Errorf("ratio %+v, want 0.5 throughout", c.Ratio)
	}
	if c.Stock.Median != 100 || c.Shielded.Max != 500 {
		t.Errorf("got %+v", c)
	}
	c = compare([]pair[float64]{{0, 1}}, func(f float64) float64 { return f })
	if len(c.Ratio.Samples) != 0 || math.IsInf(c.Ratio.Median, 0) {
		t.Errorf("a ratio to zero: %+v", c.Ratio)
	}
}

func statistics(n uint64, total time.Duration, bytes uint64) meter.Totals {
	s := meter.Totals{Transitions: n, Wait: total, Bytes: bytes}
	s.Histogram[0] = n
	return s
}

func TestTransitionsOfAPhaseAreAddedUp(t *testing.T) {
	s := speedOf([]pair[speed]{
		{shielded: speed{transitions: statistics(10, 10*time.Microsecond, 10<<10)}},
		{shielded: speed{transitions: statistics(30, 70*time.Microsecond, 30<<10)}},
	}, 64)
	want := Transitions{Count: 40, Bytes: 1024, Mean: 2, P50: 1.152, P99: 1.152}
	if s.Transitions != want {
		t.Errorf("got %+v, want %+v", s.Transitions, want)
	}
	if got := transitionsOf(meter.Totals{}); got != (Transitions{}) {
		t.Errorf("of nothing: %+v", got)
	}
}

func TestMemoryOf(t *testing.T) {
	m := memoryOf([]pair[memory]{
		{memory{engine: 100}, memory{engine: 60, enclave: 10, supervisor: 20, copy: 40, files: 7}},
		{memory{engine: 110}, memory{engine: 50, enclave: 10, supervisor: 20, copy: 40, resident: true}},
	})
	if want := (MemoryParts{60, 10, 20, 40, 7}); m.Shielded != want {
		t.Errorf("parts of the highest peak: got %+v, want %+v", m.Shielded, want)
	}
	if m.Stock.Engine != 110 || m.Peak.Shielded.Max != 130 || m.Copy.Median != 40 || !m.Resident {
		t.Errorf("got %+v", m)
	}
	if want := []float64{-10, -30}; !slices.Equal(m.Beyond.Samples, want) {
		t.Errorf("beyond the copy: got %v, want %v", m.Beyond.Samples, want)
	}
}

func sampleReport(shield func() (Shield, error)) *Report {
	c := Config{Model: "m.gguf", Runs: 1, Prompt: 512, Generate: 64, Mode: "permute", DataPlane: "shm", NewShield: shield}
	fast := speed{result: result{BuildCommit: "abc", PerSecond: 200, Threads: 2, Parameters: 1115520}}
	slow := speed{result: result{PerSecond: 190}, transitions: statistics(10, 50*time.Microsecond, 10<<10)}
	return c.report(&measurements{
		load:    []pair[loading]{{loading{1}, loading{1.5}}},
		prefill: []pair[speed]{{fast, slow}},
		decode:  []pair[speed]{{fast, slow}},
		memory:  []pair[memory]{{memory{engine: 1 << 30}, memory{engine: 1 << 20, copy: 1 << 30}}},
	})
}

func noShield() (Shield, error) { return nil, nil }

func TestTable(t *testing.T) {
	var out bytes.Buffer
	if err := sampleReport(noShield).WriteTable(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"mode permute, data plane shm", "1.12M parameters", "0.950  [0.950  0.950]", "load, s", "1.500",
		"shielded model 1024.0 MiB", "shielded - shielded model - stock: -1023.0 MiB", "KiB each way"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
}

func TestTableOfModeOff(t *testing.T) {
	var out bytes.Buffer
	if err := sampleReport(nil).WriteTable(&out); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, "stock on both sides") || strings.Contains(s, "transition") {
		t.Errorf("got\n%s", s)
	}
}

// The names that docs/bench.md promises.
func TestJSONNames(t *testing.T) {
	text, err := json.Marshal(sampleReport(noShield))
	if err != nil {
		t.Fatal(err)
	}
	var r map[string]any
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]any{
		"version":                               1.0,
		"mode":                                  "permute",
		"data_plane":                            "shm",
		"model.path":                            "m.gguf",
		"engine.build":                          "abc",
		"prefill.tokens":                        512.0,
		"decode.tokens_per_second.stock.median": 200.0,
		"decode.tokens_per_second.ratio.max":    0.95,
		"decode.transitions.count":              10.0,
		"decode.transitions.mean_microseconds":  5.0,
		"load_seconds.shielded.min":             1.5,
		"memory.copy_bytes.median":              float64(1 << 30),
		"memory.stock_parts.engine":             float64(1 << 30),
		"memory.shielded_parts.copy":            float64(1 << 30),
		"memory.resident_set_counted":           false,
	} {
		var at any = r
		for name := range strings.SplitSeq(path, ".") {
			fields, _ := at.(map[string]any)
			at = fields[name]
		}
		if at != want {
			t.Errorf("%s is %v, want %v", path, at, want)
		}
	}
}
