package shield

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kvshield/kvshield/adapters/beacon"
	"github.com/kvshield/kvshield/adapters/supervisor"
)

// hookSum is set when the command is linked, and so links again whatever is new in the hook's archive.
var hookSum string

// Modes that KVSHIELD_MODE may name.
const (
	Resident = "resident"
	Permute  = "permute"
	Off      = "off"
)

// Mode is what KVSHIELD_MODE asks for.
func Mode() string {
	if mode := os.Getenv(modeVariable); mode != "" {
		return mode
	}
	return Resident
}

const enclaveTimeout = 10 * time.Second

// Serve starts the enclave and the session socket for the runners that this process will start, and tells them by the environment.
// The returned function ends both.
func Serve(ctx context.Context) (stop func(), err error) {
	mode := Mode()
	if mode == Off {
		say("mode off: the KV cache is in clear")
		return func() {}, os.Unsetenv(socketVariable)
	}
	if mode != Resident && mode != Permute {
		return nil, fmt.Errorf("there is no mode %q; set %s to %s, %s or %s", mode, modeVariable, Resident, Permute, Off)
	}
	if os.Getenv(socketVariable) != "" { // whoever started this, kvshield serve for one, has the enclave
		return func() {}, nil
	}
	cfg, err := config(mode)
	if err != nil {
		return nil, err
	}
	s, err := supervisor.New(ctx, cfg)
	if err != nil {
		return nil, err
	}
	report, err := s.Attest(ctx, nil)
	if err == nil {
		err = os.Setenv(socketVariable, s.Socket())
	}
	if err == nil {
		err = beacon.Light(ctx, mode, s)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	protection := "TEE " + report.Backend
	if !report.Hardware {
		protection += ": no hardware protection"
	}
	slog.Debug("kvshield-ollama", "hook", hookSum)
	say("mode %s, %s", mode, protection)
	return s.Close, nil
}

func config(mode string) (supervisor.Config, error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	args := []string{"--tee", variable("TEE", "auto")}
	if mode == Resident {
		threads := variable("ENCLAVE_THREADS", "0")
		if n, err := strconv.Atoi(threads); err != nil || n < 0 || n > 256 {
			return supervisor.Config{}, fmt.Errorf("KVSHIELD_ENCLAVE_THREADS is %q; it takes 0 to 256", threads)
		}
		args = append(args, "--mode", Resident, "--threads", threads)
	}
	return supervisor.Config{
		Enclave:  variable("ENCLAVE", besides("kvshield-enclave")),
		Args:     args,
		Resident: mode == Resident,
		Scrub:    mode == Resident && variable("SCRUB", "true") != "false",
		Timeout:  enclaveTimeout,
		Log:      log,
	}, nil
}

func variable(name, otherwise string) string {
	if value := os.Getenv("KVSHIELD_" + name); value != "" {
		return value
	}
	return otherwise
}

// besides is the file of that name beside this executable.
func besides(name string) string {
	exe, err := os.Executable()
	if err != nil {
		return name
	}
	if real, err := filepath.EvalSymlinks(exe); err == nil {
		exe = real
	}
	return filepath.Join(filepath.Dir(exe), name)
}

func say(format string, a ...any) {
	fmt.Fprintln(os.Stderr, "kvshield: "+strings.TrimSpace(fmt.Sprintf(format, a...)))
}
