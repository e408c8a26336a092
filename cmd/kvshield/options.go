package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/internal/settings"
	"github.com/kvshield/kvshield/telemetry/logs"
)

const (
	modeResident = settings.Resident
	modePermute  = settings.Permute
	modeOff      = settings.Off
	defaultMode  = settings.Default
)

// options are the flags that every shielded run shares.
type options struct{ settings.Options }

func (o *options) register(cmd *cobra.Command) {
	o.RegisterMode(cmd.Flags())
	_ = cmd.RegisterFlagCompletionFunc("mode", cobra.FixedCompletions(settings.Modes, cobra.ShellCompDirectiveNoFileComp))
	o.registerShield(cmd)
}

// registerShield are the flags that do not depend on the mode.
func (o *options) registerShield(cmd *cobra.Command) {
	o.Register(cmd.Flags())
	_ = cmd.RegisterFlagCompletionFunc("log-format", cobra.FixedCompletions([]string{logs.Text, logs.JSON}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("tee", cobra.FixedCompletions([]string{"auto", "sgx", "software"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("data-plane", cobra.FixedCompletions([]string{"shm", "socket"}, cobra.ShellCompDirectiveNoFileComp))
}

func (o *options) checkMode() error { return settings.CheckMode(o.Mode) }

// say prints a line for people on standard error.
func say(format string, a ...any) { fmt.Fprintf(os.Stderr, "kvshield: "+format+"\n", a...) }

// withSupervisor starts a supervisor and its enclave for as long as f takes.
func (o *options) withSupervisor(ctx context.Context, f func(*supervisor.Supervisor) error) error {
	cfg, err := o.Config()
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
