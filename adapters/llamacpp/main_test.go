package llamacpp_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/hooks/session"
	"github.com/kvshield/kvshield/internal/gguf"
)

const patience = 60 * time.Second

// built is what TestMain makes once for all tests.
var built struct {
	dir      string
	hook     string // the hook, as `make build` makes it
	host     string // testdata/host.c
	shielded string // the demo model with frequency factors of one: the shielded model of the identity
	opened   session.Opened
}

var (
	root      = must(filepath.Abs(filepath.Join("..", "..")))
	demoModel = filepath.Join(root, "examples", "model", "demo.gguf")
	engineBin = filepath.Join(root, ".engine", "bin")
	libllama  = filepath.Join(root, ".engine", "lib", "libllama.so.0")
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func engine(name string) string { return filepath.Join(engineBin, name) }

func TestMain(m *testing.M) {
	for _, path := range []string{engine("llama-server"), engine("llama-completion"), libllama} {
		if _, err := os.Stat(path); err != nil {
			fmt.Fprintf(os.Stderr, "%s is missing: run `make engine` (or `make test`, which does)\n", path)
			os.Exit(1)
		}
	}
	built.dir = must(os.MkdirTemp("", "kvs"))
	err := errors.Join(buildHook(), buildHost(), shieldDemo())
	code := 1
	if err == nil {
		code = m.Run()
	} else {
		fmt.Fprintln(os.Stderr, err)
	}
	os.RemoveAll(built.dir)
	os.Exit(code)
}

func build(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, out)
	}
	return nil
}

func buildHook() error {
	built.hook = filepath.Join(built.dir, "libkvshield.so")
	return build("make", "-s", "-C", "preload", "OUT="+built.hook)
}

// buildHost links the host to the engine's own loader and C library, which are newer than the system's may be.
func buildHost() error {
	built.host = filepath.Join(built.dir, "host")
	deps := filepath.Join(root, ".engine", "deps")
	loaders, _ := filepath.Glob(filepath.Join(deps, "ld-linux*.so.*"))
	if len(loaders) == 0 {
		return fmt.Errorf("%s has no loader: run `make engine`", deps)
	}
	return build("cc", "-Wall", "-Wextra", "-Werror", "-O1", "preload/testdata/host.c", "-o", built.host, "-pthread", "-ldl",
		"-Wl,--dynamic-linker="+loaders[0], "-Wl,--disable-new-dtags,-rpath,"+filepath.Dir(libllama)+":"+deps)
}

func shieldDemo() error {
	in, g, err := gguf.Open(demoModel)
	if err != nil {
		return err
	}
	defer in.Close()
	number := func(key string) uint32 {
		n, _, _ := g.Uint(key)
		return uint32(n)
	}
	width, heads := number("llama.embedding_length"), number("llama.attention.head_count")
	base, found, _ := g.Float("llama.rope.freq_base")
	if !found {
		base = 10000
	}
	ones := bytes.Repeat(binary.LittleEndian.AppendUint32(nil, math.Float32bits(1)), int(width/heads/2))
	built.opened = session.Opened{Shield: true, Model: 7, Layers: number("llama.block_count"), RowFloats: width, RotaryDim: width / heads,
		RotaryBase: float32(base), Marker: "rope_freqs.weight", Fingerprint: ones}
	built.shielded = filepath.Join(built.dir, "shielded.gguf")
	return writeShielded(in, g, ones)
}

func writeShielded(in *os.File, g *gguf.File, factors []byte) error {
	data := g.Size - g.DataOffset
	padded := (data + 31) / 32 * 32
	tensors := append(append([]gguf.Tensor{}, g.Tensors...), gguf.Tensor{Name: built.opened.Marker, Dims: []int64{int64(len(factors) / 4)},
		Type: gguf.F32, Offset: padded, Size: int64(len(factors))})
	out, err := os.Create(built.shielded)
	if err != nil {
		return err
	}
	defer out.Close()
	at, err := gguf.WriteHeader(out, in, g, tensors, nil)
	if err != nil {
		return err
	}
	weights := make([]byte, data)
	if _, err := in.ReadAt(weights, g.DataOffset); err != nil {
		return err
	}
	_, err = out.WriteAt(weights, at)
	_, err2 := out.WriteAt(factors, at+padded)
	return errors.Join(err, err2)
}

// result of a program that has ended.
type result struct {
	stdout, stderr string
	code           int
}

// run runs a program with the hook preloaded; socket is the value of KVSHIELD_SOCKET, none where empty.
func run(t *testing.T, socket, program string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = environment(socket)
	cmd.WaitDelay = time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("%s did not end within %v\n%s", filepath.Base(program), patience, errs.String())
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

func environment(socket string) []string {
	env := []string{"LD_PRELOAD=" + built.hook}
	if socket != "" {
		env = append(env, "KVSHIELD_SOCKET="+socket)
	}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "LD_PRELOAD=") && !strings.HasPrefix(e, "KVSHIELD_") {
			env = append(env, e)
		}
	}
	return env
}

func runHost(t *testing.T, socket, model string, actions ...string) result {
	t.Helper()
	return run(t, socket, built.host, append([]string{libllama, engineBin, model}, actions...)...)
}

// stock is what the host prints without the hook.
func stock(t *testing.T, actions ...string) string {
	t.Helper()
	out, err := exec.Command(built.host, append([]string{libllama, engineBin, demoModel}, actions...)...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// said are the hook's own lines on standard error.
func (r result) said() []string {
	var lines []string
	for line := range strings.Lines(r.stderr) {
		if text, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "kvshield: "); ok {
			lines = append(lines, strings.TrimPrefix(text, "error: "))
		}
	}
	return lines
}

// expectDeath checks that the hook ended the process, with this message and after this output.
func (r result) expectDeath(t *testing.T, stdout, message string) {
	t.Helper()
	if said := r.said(); r.code != 1 || len(said) != 1 || said[0] != message {
		t.Errorf("exit code %d, the hook said %q; want 1 and %q", r.code, said, message)
	}
	if r.stdout != stdout {
		t.Errorf("printed %q, want %q", r.stdout, stdout)
	}
}
