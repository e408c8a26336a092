// Package settings is what can be set of a shielded run, for the command and for kvshield-ollama: flags, or the environment.
//
// Start with [Options.Register], then [FromEnvironment], then [Options.Config]. What somebody cannot have meant is a [UsageError].
package settings

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/hooks/dataplane"
	"github.com/kvshield/kvshield/hooks/session"
	"github.com/kvshield/kvshield/telemetry/logs"
)

// The modes.
const (
	Resident = "resident"
	Permute  = "permute"
	Off      = "off"
	Default  = Resident
)

// Modes in the order of what they stop.
var Modes = []string{Resident, Permute, Off}

// UsageError is a setting that cannot be meant.
type UsageError struct{ Err error }

func (e UsageError) Error() string { return e.Err.Error() }

func (e UsageError) Unwrap() error { return e.Err }

func usagef(format string, a ...any) error { return UsageError{Err: fmt.Errorf(format, a...)} }

// Options of every shielded run.
type Options struct {
	Mode, DataPlane, RuntimeDir string
	Failed                      func(at time.Time, message string) // is told of what loggers warn of; may be nil

	tee, enclave, hook, spin, logLevel, logFormat string
	capacity                                      int
	timeout                                       time.Duration
	resident                                      residentOptions
}

// RegisterMode makes the flag that chooses the mode.
func (o *Options) RegisterMode(f *pflag.FlagSet) {
	f.StringVar(&o.Mode, "mode", Default, "what the accelerator's cache holds: resident (zeros: it lives in the enclave), permute (permuted: stops an attacker who does not expect it) or off (in clear); see docs/modes.md")
}

// Register makes the flags that do not depend on the mode.
func (o *Options) Register(f *pflag.FlagSet) {
	f.StringVar(&o.tee, "tee", "auto", "what protects the enclave: sgx, software (no hardware protection), or auto")
	f.StringVar(&o.enclave, "enclave", "", "the enclave's program (default: kvshield-enclave beside this command)")
	f.StringVar(&o.hook, "hook", "", "the hook library (default: libkvshield.so beside this command)")
	f.StringVar(&o.DataPlane, "data-plane", "shm", "how attention outputs travel: shm (shared memory) or socket")
	f.IntVar(&o.capacity, "data-plane-bytes", 0, fmt.Sprintf("how many bytes one frame carries (0: %d, in mode resident %d)", dataplane.DefaultCapacity, dataplane.ResidentCapacity))
	f.StringVar(&o.spin, "spin", "auto", "how long each end of the data plane spins before it sleeps, such as 20us (auto: 0 on few cores)")
	f.DurationVar(&o.timeout, "enclave-timeout", 10*time.Second, "how long an engine waits for the enclave before it is ended")
	f.StringVar(&o.logLevel, "log-level", "warn", "debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", logs.Text, "text or json: how log lines are written")
	f.StringVar(&o.RuntimeDir, "runtime-dir", "", "directory below which this run keeps its sockets (default: the user's runtime directory, or that for temporary files)")
	o.resident.register(f)
}

// CheckMode says of a mode whether there is one of that name.
func CheckMode(mode string) error {
	if slices.Contains(Modes, mode) {
		return nil
	}
	return usagef("there is no mode %q; use --mode %s", mode, strings.Join(Modes, ", "))
}

// Logger writes to standard error.
func (o *Options) Logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return nil, usagef("there is no log level %q; use debug, info, warn or error", o.logLevel)
	}
	log, err := logs.New(os.Stderr, o.logFormat, level, o.Failed)
	if err != nil {
		return nil, usagef("%v", err)
	}
	return log, nil
}

// Config is the supervisor that the flags describe.
func (o *Options) Config() (supervisor.Config, error) {
	log, err := o.Logger()
	if err != nil {
		return supervisor.Config{}, err
	}
	transport, ok := map[string]session.Transport{"shm": session.SharedMemory, "socket": session.Socket}[o.DataPlane]
	if !ok {
		return supervisor.Config{}, usagef("there is no data plane %q; use --data-plane shm or --data-plane socket", o.DataPlane)
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
	args, err := o.resident.arguments(o.Mode)
	if err != nil {
		return supervisor.Config{}, err
	}
	return supervisor.Config{
		Hook:      Besides(o.hook, "libkvshield.so"),
		Enclave:   Besides(o.enclave, "kvshield-enclave"),
		Args:      append([]string{"--tee", o.tee}, args...),
		Resident:  o.Mode == Resident,
		Scrub:     o.Mode == Resident && o.resident.scrub,
		Transport: transport,
		Capacity:  uint32(o.capacity),
		Spin:      spin,
		Timeout:   o.timeout,
		Directory: o.RuntimeDir,
		Log:       log,
	}, nil
}

// manyCores is from how many processors on a spinning end does not take one from the engine's own threads.
const manyCores = 8

func (o *Options) spinTime() (time.Duration, error) {
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

// Besides is the given path, or the file of that name beside this executable.
func Besides(given, name string) string {
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

// FromEnvironment sets flags that were not given from KVSHIELD_NAME.
func FromEnvironment(flags *pflag.FlagSet) error {
	var err error
	flags.VisitAll(func(f *pflag.Flag) {
		name := "KVSHIELD_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if v := os.Getenv(name); v != "" && !f.Changed && err == nil {
			if e := flags.Set(f.Name, v); e != nil {
				err = usagef("%s: %v", name, e)
			}
		}
	})
	return err
}
