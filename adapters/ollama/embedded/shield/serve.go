package shield

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"

	"github.com/spf13/pflag"

	"github.com/kvshield/kvshield/adapters/beacon"
	"github.com/kvshield/kvshield/adapters/ollama/store"
	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/internal/settings"
)

// hookSum is set when the command is linked, and so links again whatever is new in the hook's archive.
var hookSum string

// What a server tells its runners.
const (
	socketVariable = "KVSHIELD_SOCKET"
	modeVariable   = "KVSHIELD_MODE"
)

// Server is the shield of one `kvshield-ollama serve`.
type Server struct {
	options settings.Options
	allowed []string
	flags   *pflag.FlagSet
}

// NewServer makes the flags that say how to shield.
func NewServer(f *pflag.FlagSet) *Server {
	s := &Server{flags: f}
	s.options.RegisterMode(f)
	s.options.Register(f)
	f.StringSliceVar(&s.allowed, "allow-unshielded", nil, "models that run in the clear, by their name or path; for those that the mode cannot shield")
	_ = f.MarkHidden("hook") // it is linked in
	return s
}

// Start starts the enclave and the session socket for the runners that this process will start, and tells them by the environment.
// The returned function ends both.
func (s *Server) Start(ctx context.Context) (stop func(), err error) {
	if err := settings.FromEnvironment(s.flags); err != nil {
		return nil, err
	}
	if err := settings.CheckMode(s.options.Mode); err != nil {
		return nil, err
	}
	if err := os.Setenv(modeVariable, s.options.Mode); err != nil {
		return nil, err
	}
	if s.options.Mode == settings.Off {
		say("mode off: the KV cache is in clear")
		return func() {}, os.Unsetenv(socketVariable)
	}
	if os.Getenv(socketVariable) != "" { // whoever started this, kvshield serve for one, has the enclave
		return func() {}, nil
	}
	cfg, err := s.options.Config()
	if err != nil {
		return nil, err
	}
	cfg.Hook, cfg.Program = "", "ollama"
	if len(s.allowed) > 0 {
		cfg.Allowed = store.Listed(s.allowed)
	}
	return begin(ctx, s.options.Mode, cfg)
}

func begin(ctx context.Context, mode string, cfg supervisor.Config) (stop func(), err error) {
	r := newReasons()
	cfg.Ended = r.ended
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
	http.DefaultClient.Transport = r
	cfg.Log.Debug("kvshield-ollama", "hook", hookSum)
	say("mode %s, %s", mode, protection)
	return s.Close, nil
}

func say(format string, a ...any) {
	fmt.Fprintln(os.Stderr, "kvshield: "+strings.TrimSpace(fmt.Sprintf(format, a...)))
}
