package plugin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kvshield/kvshield/enclave"
)

const patience = 20 * time.Second

// TestMain makes this binary its own enclave: started as "enclave DIR" it serves, otherwise it tests.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "enclave" {
		if err := Serve(Implementation{Loader: fake{}, Inverter: fake{}, Attester: fake{}}, os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// The forking thread lives as long as the process, by design.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/kvshield/kvshield/internal/forker.Do.func1.1"))
}

var someModel = enclave.Model{Action: enclave.Shield, Architecture: "llama", Name: "small", Files: 2, Layers: 3, Heads: 4,
	HeadsKV: 2, HeadDim: 8, RowFloats: 32, RotaryDim: 8, RotaryBase: 10000, Bytes: 5 << 30, ShieldBytes: 1 << 30}

var someLoad = enclave.LoadResult{ID: 7, Model: someModel, Fingerprint: []byte{1, 2, 3}, Marker: "rope_freqs.weight",
	Copies: []enclave.Copy{{File: 1, From: 1 << 33, To: 2, Length: 3}}, OutputSizes: []int64{1, 1 << 34}}

var someReport = enclave.Report{Backend: "software", Statement: "nothing protects it", Evidence: []byte("nonce!"),
	Hardening: []string{"a"}, Missing: []string{"b", "c"}}

// fake is an enclave whose answers depend on the name of the first source; its inverse is to halve.
type fake struct{}

func (fake) Inspect(_ context.Context, sources []string) (enclave.Model, error) {
	switch name := sources[0]; {
	case name == "refused":
		return enclave.Model{}, enclave.Refuse("no such architecture: %s", "x")
	case name == "invalid":
		return enclave.Model{}, fmt.Errorf("wrapped: %w", enclave.Invalid("not a model"))
	case name == "unknown":
		return enclave.Model{}, enclave.ErrUnknownModel
	case name == "other":
		return enclave.Model{}, errors.New("disk on fire")
	case name == "crash":
		os.Exit(3)
	case name == "hang":
		select {}
	case strings.HasPrefix(name, "/proc/"):
		b, err := os.ReadFile(name)
		return enclave.Model{Name: string(b)}, err
	}
	return someModel, nil
}

func (f fake) Load(ctx context.Context, r enclave.LoadRequest) (enclave.LoadResult, error) {
	if _, err := f.Inspect(ctx, r.Sources); err != nil {
		return enclave.LoadResult{}, err
	}
	return someLoad, nil
}

func (fake) Unload(_ context.Context, id enclave.ModelID) error {
	if id != someLoad.ID {
		return enclave.ErrUnknownModel
	}
	return nil
}

func (fake) Attest(_ context.Context, nonce []byte) (enclave.Report, error) {
	r := someReport
	r.Evidence = append([]byte(nil), nonce...)
	return r, nil
}

func (fake) Invert(_ enclave.ModelID, _ int, dst, src []float32) error {
	for i, v := range src {
		dst[i] = v / 2
	}
	return nil
}

func options(t *testing.T) Options {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := socketDir(t)
	return Options{Program: program, Args: []string{"enclave", dir}, SocketDir: dir}
}

// socketDir is short: a test's own directory may be too long for a socket's path.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kvs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func start(t *testing.T, change func(*Options)) *Client {
	t.Helper()
	o := options(t)
	if change != nil {
		change(&o)
	}
	c, err := Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func within(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("waited %v for %s", patience, what)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

// reaped is whether not even a zombie is left of a process.
func reaped(pid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	return errors.Is(err, os.ErrNotExist)
}
