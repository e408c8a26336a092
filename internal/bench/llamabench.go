package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/internal/forker"
)

// result is the part of a row of `llama-bench -o jsonl` that is used here. Other fields come and go between versions.
type result struct {
	BuildCommit string  `json:"build_commit"`
	BuildNumber int     `json:"build_number"`
	CPU         string  `json:"cpu_info"`
	GPU         string  `json:"gpu_info"`
	Backends    string  `json:"backends"`
	ModelType   string  `json:"model_type"`
	ModelBytes  int64   `json:"model_size"`
	Parameters  int64   `json:"model_n_params"`
	Threads     int     `json:"n_threads"`
	Prompt      int     `json:"n_prompt"`
	Generate    int     `json:"n_gen"`
	PerSecond   float64 `json:"avg_ts"`
}

// speed is one measurement with llama-bench.
type speed struct {
	result
	transitions meter.Totals
}

// parseResults reads the rows that llama-bench printed, skipping lines that are no JSON objects.
func parseResults(out []byte) ([]result, error) {
	var rows []result
	for line := range bytes.Lines(out) {
		line = bytes.TrimSpace(line)
		if !bytes.HasPrefix(line, []byte("{")) {
			continue
		}
		var r result
		if err := json.Unmarshal(line, &r); err != nil {
			return nil, fmt.Errorf("llama-bench printed what is not JSON: %w; another version of it may help", err)
		}
		rows = append(rows, r)
	}
	return rows, nil
}

// single returns the only row, which must be of the test that was asked for.
func single(rows []result, prompt, generate int) (result, error) {
	switch {
	case len(rows) == 0:
		return result{}, errors.New("llama-bench printed no result; run it by hand to see why")
	case len(rows) > 1:
		return result{}, fmt.Errorf("llama-bench ran %d tests where one was expected; leave out arguments that ask for more, such as -p, -n or lists of values", len(rows))
	}
	r := rows[0]
	if r.Prompt != prompt || r.Generate != generate {
		return result{}, fmt.Errorf("llama-bench measured %d and %d tokens where %d and %d were asked for; leave out -p, -n and -pg",
			r.Prompt, r.Generate, prompt, generate)
	}
	if !(r.PerSecond > 0) {
		return result{}, errors.New("llama-bench measured no speed; another version of it may help")
	}
	return r, nil
}

func (c *Config) measurePrefill(ctx context.Context, shield Shield) (speed, error) {
	return c.measureSpeed(ctx, shield, c.Prompt, 0)
}

func (c *Config) measureDecode(ctx context.Context, shield Shield) (speed, error) {
	return c.measureSpeed(ctx, shield, 0, c.Generate)
}

func (c *Config) measureSpeed(ctx context.Context, shield Shield, prompt, generate int, more ...string) (speed, error) {
	out, err := c.runBench(ctx, shield, nil, append([]string{"-p", strconv.Itoa(prompt), "-n", strconv.Itoa(generate)}, more...)...)
	if err != nil {
		return speed{}, err
	}
	rows, err := parseResults(out)
	if err != nil {
		return speed{}, err
	}
	r, err := single(rows, prompt, generate)
	if err != nil {
		return speed{}, err
	}
	s := speed{result: r}
	if shield != nil {
		s.transitions = shield.Totals()
	}
	return s, nil
}

// observer looks at a running process until done is closed.
type observer func(pid int, done <-chan struct{})

// runBench runs llama-bench to its end, under the eyes of an observer if there is one, and returns what it printed.
func (c *Config) runBench(ctx context.Context, shield Shield, observe observer, args ...string) ([]byte, error) {
	args = append([]string{"-m", c.Model, "-o", "jsonl", "-r", "1"}, args...)
	if c.Threads > 0 {
		args = append(args, "-t", strconv.Itoa(c.Threads))
	}
	cmd := exec.CommandContext(ctx, c.Bench, append(args, c.Args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = environment(shield), &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.WaitDelay = time.Second
	var err error
	forker.Do(func() { err = cmd.Start() })
	if err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", c.Bench, err)
	}
	if observe != nil {
		done, over := make(chan struct{}), make(chan struct{})
		go func() { defer close(over); observe(cmd.Process.Pid, done) }()
		defer func() { close(done); <-over }()
	}
	if err := cmd.Wait(); err != nil {
		return nil, benchError(ctx, err, stderr.String())
	}
	return stdout.Bytes(), nil
}

func environment(shield Shield) []string {
	if shield == nil {
		return os.Environ()
	}
	return shield.Environment(os.Environ())
}

const lastLines = 4

// benchError says how llama-bench ended, with its last words.
func benchError(ctx context.Context, err error, stderr string) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	lines := strings.Split(strings.TrimSpace(stderr), "\n")
	tail := strings.Join(lines[max(0, len(lines)-lastLines):], "\n  ")
	if tail == "" {
		return fmt.Errorf("llama-bench ended (%w)", err)
	}
	return fmt.Errorf("llama-bench ended (%w); its last words:\n  %s", err, tail)
}
