package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/internal/gguf"
)

// healthEvery is closer than a server is usually asked: that step would be a good part of a small load.
const healthEvery = 5 * time.Millisecond

// loading is one measurement of a load.
type loading struct{ seconds float64 }

// measureLoad times a llama-server from its start until it answers that its model is loaded.
func (c *Config) measureLoad(ctx context.Context, shield Shield) (loading, error) {
	dir, err := supervisor.NewRuntimeDir("")
	if err != nil {
		return loading{}, err
	}
	defer dir.Remove()
	sc := llamacpp.ServerConfig{Program: c.Server, Model: c.Model, Socket: dir.Path("engine.sock"), Env: environment(shield), HealthEvery: healthEvery}
	if c.Threads > 0 {
		sc.Args = []string{"-t", strconv.Itoa(c.Threads)}
	}
	began := time.Now()
	s, err := llamacpp.StartServer(sc)
	if err != nil {
		return loading{}, err
	}
	err = s.WaitHealthy(ctx)
	took := time.Since(began)
	s.Kill()
	return loading{took.Seconds()}, serverError(err)
}

// serverError adds the last words of a server that ended by itself.
func serverError(err error) error {
	var exit *llamacpp.ExitError
	if errors.As(err, &exit) && exit.Tail != "" {
		return fmt.Errorf("%w; its last words:\n  %s", err, exit.Tail)
	}
	return err
}

// readModel reads the files of a model once.
func readModel(ctx context.Context, path string) error {
	f, g, err := gguf.Open(path)
	if err != nil {
		return err
	}
	f.Close()
	paths := []string{path}
	if n, found, err := g.Uint("split.count"); err == nil && found && n > 1 && n <= 4096 {
		if paths, err = gguf.SplitPaths(path, int(n)); err != nil {
			return err
		}
	}
	for _, p := range paths {
		if err := readFile(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

func readFile(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 4<<20)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.Read(buf); err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("cannot read %s: %w", path, err)
		}
	}
}
