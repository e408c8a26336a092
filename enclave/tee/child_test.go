package tee

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/secmem"
)

// The tests of hardening run this test binary again, as a process that may be hardened.

// task is what a child is asked to do, in its environment.
type task struct {
	Role    string // "hardened", "bystander" (the same, not hardened) or "attacker"
	Options Options
	Inside  string // a directory of Options.WritableDirs
	Outside string // a directory that is not
	Memfd   string // /proc/PID/fd/N of the parent's memory file
	TCP     string // an address that the parent listens on
	Target  int    // the process that an attacker attacks
	Foreign bool   // try a call of another architecture, which a kernel without them answers with a signal
}

// foreignCall makes a call of another architecture, where there is one.
var foreignCall func() error

// seen is what a child reports: for every attempt "ok" or the name of the error.
type seen struct {
	Error     string
	Report    enclave.Report
	Attempts  map[string]string
	Dumpable  bool
	CoreMax   uint64
	Threads   int
	NoNewPriv int            // threads with no_new_privs
	Filters   map[string]int // threads by their number of seccomp filters
	SecretAt  int64          // address of key bytes in secret memory, 0 without
	HeapAt    int64          // address of the same bytes on the Go heap
}

const (
	childEnv = "TEE_TEST_CHILD"
	keyBytes = "key bytes that nobody may read"
	memfdFD  = 3 // the parent's memory file, inherited

	noProcess = 1<<22 + 1 // beyond the largest process id of Linux
)

func TestMain(m *testing.M) {
	if text := os.Getenv(childEnv); text != "" {
		child(text)
		return
	}
	os.Exit(m.Run())
}

// child does its task, reports, and stays until its standard input closes.
func child(text string) {
	var do task
	if err := json.Unmarshal([]byte(text), &do); err != nil {
		panic(err)
	}
	// Threads that exist before hardening have to be covered as well.
	for range 4 {
		go func() { runtime.LockOSThread(); select {} }()
	}
	var saw seen
	var heap *[]byte
	switch do.Role {
	case "attacker":
		saw.Attempts = attack(do.Target)
	case "hardened":
		b, err := Software(do.Options)
		if err != nil {
			saw.Error = err.Error()
			break
		}
		saw.Report, _ = b.Report(nil)
		fallthrough
	default:
		heap = observe(&saw, do)
	}
	if err := json.NewEncoder(os.Stdout).Encode(saw); err != nil {
		panic(err)
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	runtime.KeepAlive(heap)
}

func observe(saw *seen, do task) *[]byte {
	saw.Attempts = map[string]string{}
	for name, attempt := range attempts(do) {
		saw.Attempts[name] = outcome(attempt())
	}
	if do.Foreign {
		saw.Attempts["foreign call"] = outcome(foreignCall())
	}
	saw.Dumpable = dumpable()
	var core unix.Rlimit
	_ = unix.Getrlimit(unix.RLIMIT_CORE, &core)
	saw.CoreMax = core.Max
	countThreads(saw)
	heap := []byte(keyBytes)
	saw.HeapAt = int64(uintptr(unsafe.Pointer(&heap[0])))
	if r, err := secmem.New(len(keyBytes)); err == nil && r.Kind() == secmem.Secret {
		copy(r.Bytes(), keyBytes)
		saw.SecretAt = int64(uintptr(unsafe.Pointer(&r.Bytes()[0])))
	}
	return &heap
}

func attempts(do task) map[string]func() error {
	return map[string]func() error{
		"write inside":        func() error { return os.WriteFile(filepath.Join(do.Inside, "new"), nil, 0o600) },
		"remove inside":       func() error { return os.Remove(filepath.Join(do.Inside, "old")) },
		"listen inside":       func() error { return closeOf(net.Listen("unix", filepath.Join(do.Inside, "own"))) },
		"connect inside":      func() error { return closeOf(net.Dial("unix", filepath.Join(do.Inside, "host"))) },
		"write outside":       func() error { return os.WriteFile(filepath.Join(do.Outside, "new"), nil, 0o600) },
		"truncate outside":    func() error { return os.Truncate(filepath.Join(do.Outside, "old"), 0) },
		"remove outside":      func() error { return os.Remove(filepath.Join(do.Outside, "victim")) },
		"listen outside":      func() error { return closeOf(net.Listen("unix", filepath.Join(do.Outside, "own"))) },
		"read outside":        func() error { _, err := os.ReadFile(filepath.Join(do.Outside, "old")); return err },
		"inherited memfd":     func() error { return writeTo(fmt.Sprintf("/proc/self/fd/%d", memfdFD)) },
		"memfd of the host":   func() error { return writeTo(do.Memfd) },
		"connect over TCP":    func() error { return closeOf(net.Dial("tcp", do.TCP)) },
		"start a program":     startProgram,
		"trace a process":     func() error { return rawCall(unix.SYS_PTRACE, unix.PTRACE_ATTACH, noProcess, 0) },
		"read a process":      func() error { return rawCall(unix.SYS_PROCESS_VM_READV, uintptr(os.Getpid()), 0, 0) },
		"become dumpable":     func() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) },
		"allocate and return": churn,
	}
}

// startProgram starts this binary once more, to run no test and without a task.
func startProgram() error {
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = []string{}
	return cmd.Run()
}

// churn makes the runtime map memory and give it back, which locked memory must not break.
func churn() error {
	for range 4 {
		b := make([]byte, 8<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		runtime.KeepAlive(b)
	}
	runtime.GC()
	return nil
}

func closeOf[C io.Closer](c C, err error) error {
	if err != nil {
		return err
	}
	return c.Close()
}

func writeTo(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt([]byte("shielded"), 0)
	return err
}

func rawCall(call, a, b, c uintptr) error {
	if _, _, errno := unix.Syscall6(call, a, b, c, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func outcome(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

func countThreads(saw *seen) {
	saw.Filters = map[string]int{}
	tasks, _ := filepath.Glob("/proc/self/task/*/status")
	for _, task := range tasks {
		status, err := os.ReadFile(task)
		if err != nil {
			continue
		}
		saw.Threads++
		saw.NoNewPriv += strings.Count(string(status), "\nNoNewPrivs:\t1\n")
		_, after, _ := strings.Cut(string(status), "\nSeccomp_filters:\t")
		filters, _, _ := strings.Cut(after, "\n")
		saw.Filters[filters]++
	}
}

// attack does to another process what somebody with the same user id would try.
func attack(pid int) map[string]string {
	runtime.LockOSThread() // a tracer is a thread
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDONLY, 0)
	if err == nil {
		mem.Close()
	}
	_, maps := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	attached := unix.PtraceAttach(pid)
	if attached == nil {
		var status unix.WaitStatus
		_, _ = unix.Wait4(pid, &status, 0, nil)
		_ = unix.PtraceDetach(pid)
	}
	return map[string]string{"mem": outcome(err), "maps": outcome(maps), "attach": outcome(attached)}
}
