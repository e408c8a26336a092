package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/hooks/dataplane"
	"github.com/kvshield/kvshield/hooks/session"
	"github.com/kvshield/kvshield/telemetry/live"
	"github.com/kvshield/kvshield/telemetry/logs"
)

const (
	modeResident = "resident"
	modePermute  = "permute"
	modeOff      = "off"
	defaultMode  = modeResident
)

// modes in the order of what they stop.
var modes = []string{modeResident, modePermute, modeOff}

// options are the flags that every shielded run shares.
type options struct {
	mode       string
	tee        string
	enclave    string
	hook       string
	dataPlane  string
	capacity   int
	spin       string
	timeout    time.Duration
	logLevel   string
	logFormat  string
	runtimeDir string
	resident   residentOptions
	errors     *live.Errors // keeps what loggers warn of; nil: nobody asks
}

func (o *options) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.mode, "mode", defaultMode, "what the accelerator's cache holds: resident (zeros: it lives in the enclave), permute (permuted: stops an attacker who does not expect it) or off (in clear); see docs/modes.md")
	_ = cmd.RegisterFlagCompletionFunc("mode", cobra.FixedCompletions(modes, cobra.ShellCompDirectiveNoFileComp))
	o.registerShield(cmd)
}

// registerShield are the flags that do not depend on the mode.
func (o *options) registerShield(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.tee, "tee", "auto", "what protects the enclave: sgx, software (no hardware protection), or auto")
	f.StringVar(&o.enclave, "enclave", "", "the enclave's program (default: kvshield-enclave beside this command)")
	f.StringVar(&o.hook, "hook", "", "the hook library (default: libkvshield.so beside this command)")
	f.StringVar(&o.dataPlane, "data-plane", "shm", "how attention outputs travel: shm (shared memory) or socket")
	f.IntVar(&o.capacity, "data-plane-bytes", 0, fmt.Sprintf("how many bytes one frame carries (0: %d, in mode resident %d)", dataplane.DefaultCapacity, dataplane.ResidentCapacity))
	f.StringVar(&o.spin, "spin", "auto", "how long each end of the data plane spins before it sleeps, such as 20us (auto: 0 on few cores)")
	f.DurationVar(&o.timeout, "enclave-timeout", 10*time.Second, "how long an engine waits for the enclave before it is ended")
	f.StringVar(&o.logLevel, "log-level", "warn", "debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", logs.Text, "text or json: how log lines are written")
	f.StringVar(&o.runtimeDir, "runtime-dir", "", "directory below which this run keeps its sockets (default: the user's runtime directory, or that for temporary files)")
	o.resident.register(f)
	_ = cmd.RegisterFlagCompletionFunc("log-format", cobra.FixedCompletions([]string{logs.Text, logs.JSON}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("tee", cobra.FixedCompletions([]string{"auto", "sgx", "software"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("data-plane", cobra.FixedCompletions([]string{"shm", "socket"}, cobra.ShellCompDirectiveNoFileComp))
}

func (o *options) checkMode() error { return checkMode(o.mode) }

func checkMode(mode string) error {
	if slices.Contains(modes, mode) {
		return nil
	}
	return usagef("there is no mode %q; use --mode %s", mode, strings.Join(modes, ", "))
}

// logger writes to standard error.
func (o *options) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return nil, usagef("there is no log level %q; use debug, info, warn or error", o.logLevel)
	}
	var failed func(time.Time, string)
	if o.errors != nil {
		failed = func(at time.Time, message string) { o.errors.Add(at, "log", message) }
	}
	log, err := logs.New(os.Stderr, o.logFormat, level, failed)
	if err != nil {
		return nil, usagef("%v", err)
	}
	return log, nil
}

// config is the supervisor that the flags describe.
func (o *options) config() (supervisor.Config, error) {
	log, err := o.logger()
	if err != nil {
		return supervisor.Config{}, err
	}
	transport, ok := map[string]session.Transport{"shm": session.SharedMemory, "socket": session.Socket}[o.dataPlane]
	if !ok {
		return supervisor.Config{}, usagef("there is no data plane %q; use --data-plane shm or --data-plane socket", o.dataPlane)
	}
	spin, err := o.spinTime()
	if err != nil {
		return supervisor.Config{}, err
	}
	if o.capacity < 0 || o.capacity%4096 != 0 || o.capacity > 1<<30 {
		return supervisor.Config{}, usagef("--data-plane-bytes %d: it takes a multiple of 4096 up to 1 GiB", o.capacity)
	}
	if o.timeout < 10*time.Millisecond || o.timeout > time.Hour {
		return supervisor.Config{}, usagef("--enclave-timeout %v: it takes 10ms to 1h", o.timeout)
	}
	args, err := o.resident.arguments(o.mode)
	if err != nil {
		return supervisor.Config{}, err
	}
	return supervisor.Config{
		Hook:      besides(o.hook, "libkvshield.so"),
		Enclave:   besides(o.enclave, "kvshield-enclave"),
		Args:      append([]string{"--tee", o.tee}, args...),
		Resident:  o.mode == modeResident,
		Scrub:     o.mode == modeResident && o.resident.scrub,
		Transport: transport,
		Capacity:  uint32(o.capacity),
		Spin:      spin,
		Timeout:   o.timeout,
		Directory: o.runtimeDir,
		Log:       log,
	}, nil
}

// manyCores is from how many processors on a spinning end does not take one from the engine's own threads.
const manyCores = 8

func (o *options) spinTime() (time.Duration, error) {
	if o.spin == "auto" {
		if runtime.NumCPU() >= manyCores {
			return 50 * time.Microsecond, nil
		}
		return 0, nil
	}
	d, err := time.ParseDuration(o.spin)
	if err != nil || d < 0 || d > 10*time.Millisecond {
		return 0, usagef("--spin %s: it takes auto or a time up to 10ms, such as 20us", o.spin)
	}
	return d, nil
}

// besides is the given path, or the file of that name beside this executable.
func besides(given, name string) string {
	if given != "" {
		return given
	}
	exe, err := os.Executable()
	if err != nil {
		return name
	}
	if real, err := filepath.EvalSymlinks(exe); err == nil {
		exe = real
	}
	return filepath.Join(filepath.Dir(exe), name)
}

// say prints a line for people on standard error.
func say(format string, a ...any) { fmt.Fprintf(os.Stderr, "kvshield: "+format+"\n", a...) }

// withSupervisor starts a supervisor and its enclave for as long as f takes.
func (o *options) withSupervisor(ctx context.Context, f func(*supervisor.Supervisor) error) error {
	cfg, err := o.config()
	if err != nil {
		return err
	}
	s, err := supervisor.New(ctx, cfg)
	if err != nil {
		return err
	}
	defer s.Close()
	return f(s)
}
