package settings

import (
	"strconv"

	"github.com/dustin/go-humanize"
	"github.com/spf13/pflag"
)

// residentOptions are the flags of mode resident.
type residentOptions struct {
	memory, storage string
	threads         int
	scrub           bool
}

func (o *residentOptions) register(f *pflag.FlagSet) {
	f.StringVar(&o.memory, "enclave-memory", "auto", "mode resident: most memory for KV caches in the enclave, such as 8GiB (auto: half of the machine's)")
	f.StringVar(&o.storage, "enclave-storage", "auto", "mode resident: how the enclave keeps keys and values: f16, f32, q8_0 (half of f16), or auto (what --cache-type-k asks for)")
	f.IntVar(&o.threads, "enclave-threads", 0, "mode resident: threads that compute attention (0: chosen by the number of processors)")
	f.BoolVar(&o.scrub, "scrub", true, "mode resident: wipe keys, values and queries in the engine once they are taken, and its compute buffers after each graph")
}

// arguments of the enclave's program.
func (o *residentOptions) arguments(mode string) ([]string, error) {
	if mode != Resident {
		return nil, nil
	}
	args := []string{"--mode", Resident}
	if o.memory != "auto" {
		n, err := humanize.ParseBytes(o.memory)
		if err != nil || n < 1<<20 || n > 1<<50 {
			return nil, usagef("--enclave-memory %s: it takes auto or a size from 1MiB, such as 8GiB", o.memory)
		}
		args = append(args, "--memory", strconv.FormatUint(n, 10))
	}
	switch o.storage {
	case "auto":
	case "f16", "f32", "q8_0":
		args = append(args, "--storage", o.storage)
	default:
		return nil, usagef("--enclave-storage %s: it takes auto, f16, f32 or q8_0", o.storage)
	}
	if o.threads < 0 || o.threads > 256 {
		return nil, usagef("--enclave-threads %d: it takes 0 to 256", o.threads)
	}
	return append(args, "--threads", strconv.Itoa(o.threads)), nil
}
