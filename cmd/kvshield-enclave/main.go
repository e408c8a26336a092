// Command kvshield-enclave is the enclave process: it holds the keys. It is started by kvshield through go-plugin and
// is of no use by hand.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/tee"
	"github.com/kvshield/kvshield/enclave/vault"
	"github.com/kvshield/kvshield/plugin"
)

// heapLimits make the garbage collector work harder before the enclave outgrows its share of memory. Mode resident has attention masks on
// the heap; keys and values are not.
var heapLimits = map[string]int64{"permute": 48 << 20, "resident": 1 << 30}

func main() {
	backend := flag.String("tee", "auto", "TEE backend: sgx, software, or auto")
	mode := flag.String("mode", "permute", "permute or resident")
	var r residentFlags
	r.register()
	dir := flag.String("runtime-dir", "", "directory for sockets, closed to other users")
	flag.Parse()
	if err := run(*backend, *dir, *mode, r); err != nil {
		fmt.Fprintln(os.Stderr, "kvshield-enclave:", err)
		os.Exit(1)
	}
}

func run(backend, dir, mode string, r residentFlags) error {
	if os.Getenv("KVSHIELD_PLUGIN_COOKIE") == "" {
		return fmt.Errorf("this program is started by kvshield; run `kvshield --help`")
	}
	if dir == "" {
		return fmt.Errorf("--runtime-dir is missing")
	}
	if limit, ok := heapLimits[mode]; ok {
		debug.SetMemoryLimit(limit)
	}
	t, err := tee.Select(backend, tee.Options{WritableDirs: []string{dir}})
	if err != nil {
		return err
	}
	removeWhenOrphaned(dir)
	impl, err := implementation(mode, r)
	if err != nil {
		return err
	}
	impl.Attester = attester{t}
	return plugin.Serve(impl, dir)
}

func implementation(mode string, r residentFlags) (plugin.Implementation, error) {
	switch mode {
	case "permute":
		v := vault.New(vault.Options{})
		return plugin.Implementation{Loader: v, Inverter: v}, nil
	case "resident":
		register := vault.NewRegister()
		keeper, err := r.keeper(register.Digest)
		return plugin.Implementation{Loader: register, Keeper: keeper}, err
	}
	return plugin.Implementation{}, fmt.Errorf("there is no mode %q", mode)
}

type attester struct{ tee.Backend }

func (a attester) Attest(_ context.Context, nonce []byte) (enclave.Report, error) {
	return a.Report(nonce)
}

const (
	orphanedWithin = 2 * time.Second
	orphanedLook   = 5 * time.Millisecond
)

// removeWhenOrphaned tidies up after a supervisor that was killed: its death is signalled to this process
// (PR_SET_PDEATHSIG), which is the last one to know the runtime directory. The signal comes while the supervisor is
// still dying, a moment before this process has another parent.
func removeWhenOrphaned(dir string) {
	parent := os.Getppid()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	go func() {
		<-signals
		for end := time.Now().Add(orphanedWithin); time.Now().Before(end); time.Sleep(orphanedLook) {
			if os.Getppid() != parent {
				os.RemoveAll(dir)
				break
			}
		}
		os.Exit(0)
	}()
}
