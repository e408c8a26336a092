package bench

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"
)

const row = `{"build_commit": "Debian", "build_number": 11669, "cpu_info": "Some CPU", "gpu_info": "", "backends": "CPU", ` +
	`"model_filename": "m.gguf", "model_type": "llama 1B Q8_0", "model_size": 2233856, "model_n_params": 1115520, ` +
	`"n_threads": 2, "tensor_split": "0.00", "n_prompt": 512, "n_gen": 0, "avg_ts": 87.980402, "samples_ts": [ 87.9804 ]}`

func TestParseResults(t *testing.T) {
	rows, err := parseResults([]byte("warning: something\n\n" + row + "\n" + row))
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 2 {
		t.Fatalf("got %d rows, want 2", len(rows))
	}
	want := result{BuildCommit: "Debian", BuildNumber: 11669, CPU: "Some CPU", Backends: "CPU", ModelType: "llama 1B Q8_0",
		ModelBytes: 2233856, Parameters: 1115520, Threads: 2, Prompt: 512, PerSecond: 87.980402}
	if rows[1] != want {
		t.Errorf("got %+v\nwant %+v", rows[1], want)
	}
}

func TestParseResultsRefusesWhatIsCutOff(t *testing.T) {
	if _, err := parseResults([]byte(row[:100])); err == nil || !strings.Contains(err.Error(), "not JSON") {
		t.Errorf("got %v, want an error about JSON", err)
	}
}

func TestSingle(t *testing.T) {
	good := result{Prompt: 512, PerSecond: 10}
	for name, c := range map[string]struct {
		rows []result
		want string // part of the error; empty: none
	}{
		"one":              {[]result{good}, ""},
		"none":             {nil, "no result"},
		"two":              {[]result{good, good}, "2 tests where one was expected"},
		"another prompt":   {[]result{{Prompt: 4, PerSecond: 10}}, "measured 4 and 0 tokens where 512 and 0"},
		"another generate": {[]result{{Prompt: 512, Generate: 1, PerSecond: 10}}, "leave out -p, -n and -pg"},
		"no speed":         {[]result{{Prompt: 512}}, "no speed"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := single(c.rows, 512, 0)
			switch {
			case c.want == "" && (err != nil || got != good):
				t.Errorf("got %+v, %v", got, err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got error %v, want %q in it", err, c.want)
			}
		})
	}
}

func TestBenchError(t *testing.T) {
	exit := errors.New("exit status 1")
	got := benchError(t.Context(), exit, "1\n2\n3\n4\n5\n").Error()
	if want := "llama-bench ended (exit status 1); its last words:\n  2\n  3\n  4\n  5"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := benchError(ctx, exit, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("after an interrupt: got %v, want %v", err, context.Canceled)
	}
}

// fakeBench makes a Config whose llama-bench is a shell script.
func fakeBench(t *testing.T, script string) *Config {
	t.Helper()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("no sh on this machine")
	}
	path := t.TempDir() + "/llama-bench"
	write(t, path, "#!"+sh+"\n"+script, 0o755)
	return &Config{Model: "m.gguf", Bench: path, Runs: 1, Prompt: 512, Generate: 64}
}

func TestMeasurePrefillAsksForOneTest(t *testing.T) {
	c := fakeBench(t, `printf '%s\n' "$*" >&2; test "$*" = "-m m.gguf -o jsonl -r 1 -p 512 -n 0 -t 3 -fa off" && echo '`+row+`'`)
	c.Threads, c.Args = 3, []string{"-fa", "off"}
	got, err := c.measurePrefill(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.PerSecond != 87.980402 {
		t.Errorf("got %v tokens/s", got.PerSecond)
	}
}

func TestAnInterruptEndsTheEngine(t *testing.T) {
	c := fakeBench(t, "exec sleep 1000")
	ctx, cancel := context.WithCancel(t.Context())
	observe := func(pid int, done <-chan struct{}) { cancel(); <-done }
	if _, err := c.runBench(ctx, nil, observe); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}
