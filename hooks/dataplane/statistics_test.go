package dataplane

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/telemetry"
)

func TestQuantile(t *testing.T) {
	var none Statistics
	if got := none.Quantile(0.5); got != 0 {
		t.Errorf("of nothing: %v", got)
	}
	var s Statistics
	s.Histogram[0], s.Histogram[8], s.Histogram[telemetry.Buckets-1] = 98, 1, 1
	for q, want := range map[float64]time.Duration{0.01: 1152, 0.5: 1152, 0.98: 1152, 0.99: 2304, 1: telemetry.BucketEnd(telemetry.Buckets - 1)} {
		if got := s.Quantile(q); got != want {
			t.Errorf("quantile %v: %d ns, want %d", q, got, want)
		}
	}
}

func TestAdd(t *testing.T) {
	a := Statistics{Transitions: 1, Total: 2, Bytes: 3}
	b := Statistics{Transitions: 10, Total: 20, Bytes: 30}
	b.Histogram[5] = 4
	a.Add(b)
	want := Statistics{Transitions: 11, Total: 22, Bytes: 33}
	want.Histogram[5] = 4
	if a != want {
		t.Errorf("%+v", a)
	}
}

func TestStatisticsReadWhatTheEngineCounts(t *testing.T) {
	r, err := Map(create(t, 4096))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	*r.long(offTransitions), *r.long(offNanoseconds), *r.long(offBytes) = 2, 3000, 64
	*r.long(offHistogram + 8*3) = 2
	want := Statistics{Transitions: 2, Total: 3000, Bytes: 64}
	want.Histogram[3] = 2
	if got := r.Statistics(); got != want {
		t.Errorf("%+v", got)
	}
}

// The hook counts in C: its function is compiled as it is and asked for the bucket of durations around every bound.
func TestHookPutsDurationsIntoTheSameBuckets(t *testing.T) {
	program := filepath.Join(t.TempDir(), "bucket")
	core := filepath.Join("..", "core")
	source := filepath.Join("..", "..", "adapters", "llamacpp", "preload", "testdata", "bucket.c")
	if out, err := exec.Command("cc", "-Wall", "-Wno-unused-function", "-pthread", "-I"+core, source, "-o", program).CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", source, err, out)
	}
	var asked []time.Duration
	var want []int
	ask := func(ns time.Duration, bucket int) { asked, want = append(asked, ns), append(want, bucket) }
	ask(0, 0)
	ask(1023, 0)
	for i := range telemetry.Buckets {
		start := time.Duration(1024)
		if i > 0 {
			start = telemetry.BucketEnd(i - 1)
		}
		ask(start, i)
		ask((start+telemetry.BucketEnd(i))/2, i)
		ask(telemetry.BucketEnd(i)-1, i)
	}
	ask(telemetry.BucketEnd(telemetry.Buckets-1), telemetry.Buckets-1)
	ask(1<<62, telemetry.Buckets-1)

	var input strings.Builder
	for _, ns := range asked {
		fmt.Fprintln(&input, int64(ns))
	}
	cmd := exec.Command(program)
	cmd.Stdin = strings.NewReader(input.String())
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Fields(string(out))
	if len(lines) != len(want) {
		t.Fatalf("%d answers to %d durations", len(lines), len(want))
	}
	for i, line := range lines {
		if got, err := strconv.Atoi(line); err != nil || got != want[i] {
			t.Errorf("%d ns: the hook says bucket %s, want %d", asked[i], line, want[i])
		}
	}
}
