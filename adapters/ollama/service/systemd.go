package service

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

const systemctlWithin = 2 * time.Minute

// Booted says whether this machine runs systemd, and its systemctl is there.
func Booted() bool {
	_, err := exec.LookPath("systemctl")
	return err == nil && isDir("/run/systemd/system")
}

func systemctl(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, systemctlWithin)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return strings.TrimSpace(string(out)), nil
}

// Reload has systemd read its units again, and the service started again where it runs.
func Reload(ctx context.Context) error {
	if _, err := systemctl(ctx, "daemon-reload"); err != nil {
		return err
	}
	_, err := systemctl(ctx, "try-restart", unitName)
	return err
}

// Running is the service's main process on this machine, 0 where it does not run.
func Running() int {
	if !Booted() {
		return 0
	}
	out, err := systemctl(context.Background(), "show", "--property=MainPID", "--value", unitName)
	pid, _ := strconv.Atoi(out)
	if err != nil {
		return 0
	}
	return pid
}
