package tee

import (
	"fmt"

	"github.com/kvshield/kvshield/enclave"
)

const softwareStatement = "software backend: no hardware protection; whoever controls the kernel or is root can read the keys"

// Options of the software backend.
type Options struct {
	// WritableDirs are existing directories below which the process may still create, change and
	// remove files and sockets. Everything else becomes read-only for it.
	WritableDirs []string
	// HostFiles says that the process has to open files of another process through
	// /proc/PID/fd. Landlock forbids that to a confined process, whatever its rules, so Landlock
	// is left out and the report says so. A descriptor that was handed over (inherited, or
	// passed over a Unix socket) can be used, and reopened through /proc/self/fd, without this.
	HostFiles bool
}

// SoftwareBackend is an ordinary process that Linux keeps apart from other processes.
type SoftwareBackend struct {
	obtained []string
	missing  []string
}

var _ Backend = (*SoftwareBackend)(nil)

// HardeningError is an essential measure that the kernel refused: without it the process would
// have held keys unprotected.
type HardeningError struct {
	Measure string
	Err     error
}

func (e *HardeningError) Error() string {
	return fmt.Sprintf("hardening the enclave process failed at %q: %v; run it where the kernel allows this", e.Measure, e.Err)
}

func (e *HardeningError) Unwrap() error { return e.Err }

// measure is one step of hardening. It returns what was obtained in one line, or the reason why
// it was not.
type measure struct {
	name      string
	essential bool
	apply     func(Options) (string, error)
}

// The order matters: no_new_privs is what an ordinary user needs for Landlock and seccomp, and
// seccomp comes last because it also forbids undoing the first step.
var measures = []measure{
	{"not dumpable", true, forbidDumps},
	{"core files", false, forbidCores},
	{"no_new_privs", false, forbidNewPrivileges},
	{"locked memory", false, lockMemory},
	{"landlock", false, confineFiles},
	{"seccomp", false, denySyscalls},
}

// Software hardens this process, for the rest of its life: afterwards it starts no programs, writes
// no core file and has no debugger but root's. It returns a *HardeningError when an essential
// measure is refused. Call it after whatever needs files outside WritableDirs or TCP.
func Software(opt Options) (*SoftwareBackend, error) { return harden(measures, opt) }

func harden(measures []measure, opt Options) (*SoftwareBackend, error) {
	b := &SoftwareBackend{}
	for _, m := range measures {
		got, err := m.apply(opt)
		switch {
		case err == nil:
			b.obtained = append(b.obtained, m.name+": "+got)
		case m.essential:
			return nil, &HardeningError{Measure: m.name, Err: err}
		default:
			b.missing = append(b.missing, m.name+": "+err.Error())
		}
	}
	return b, nil
}

// Report says what was obtained from the kernel. It carries no evidence: nothing vouches for it.
func (b *SoftwareBackend) Report(nonce []byte) (enclave.Report, error) {
	if err := checkNonce(nonce); err != nil {
		return enclave.Report{}, err
	}
	return enclave.Report{
		Backend:   "software",
		Statement: softwareStatement,
		Hardening: append([]string(nil), b.obtained...),
		Missing:   append([]string(nil), b.missing...),
	}, nil
}
