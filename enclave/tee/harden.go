package tee

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// forbidDumps asks first, because seccomp refuses the change once it is in force.
func forbidDumps(Options) (string, error) {
	if dumpable() {
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
			return "", err
		}
	}
	if dumpable() {
		return "", errors.New("the kernel left the process dumpable")
	}
	return "no core dump, and only root can attach a debugger", nil
}

func dumpable() bool {
	v, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	return err != nil || v != 0
}

func forbidCores(Options) (string, error) {
	none := unix.Rlimit{}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &none); err != nil {
		return "", err
	}
	return "limited to 0 bytes", nil
}

// forbidNewPrivileges counts on every thread having it: the flag belongs to a thread, and the
// runtime has several by now.
func forbidNewPrivileges(Options) (string, error) {
	if err := ll.AllThreadsPrctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return "", err
	}
	tasks, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil || len(tasks) == 0 {
		return "", errors.New("set, but the threads cannot be checked: /proc is not readable")
	}
	for _, task := range tasks {
		status, err := os.ReadFile(task)
		if err == nil && !bytes.Contains(status, []byte("\nNoNewPrivs:\t1\n")) {
			return "", errors.New("a thread was left without it")
		}
	}
	return "set on every thread", nil
}

// lockMemory leaves a small limit alone: with MCL_FUTURE the Go runtime would be refused memory
// later, and end the process. Keys lie in locked memory of their own anyway.
func lockMemory(Options) (string, error) {
	if !mayLockEverything() {
		return "", errors.New("RLIMIT_MEMLOCK is limited, raise it to unlimited; key memory is locked separately")
	}
	// On fault: without it the address space that the runtime reserves would be populated.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return "", err
	}
	return "the whole process, nothing of it is swapped", nil
}

func mayLockEverything() bool {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil && limit.Cur == unix.RLIM_INFINITY {
		return true
	}
	return hasCapability(unix.CAP_IPC_LOCK)
}

func hasCapability(capability int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil {
		return false
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0
}

// readOnly leaves out execution, which RODirs would allow.
const readOnly = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSReadDir)

// confineFiles takes the fifth version of Landlock, with files and TCP, or what this kernel has of
// it. Later versions add limits on signals and Unix sockets, which the host needs.
func confineFiles(opt Options) (string, error) {
	if opt.HostFiles {
		return "", errors.New("left out, because this process has to open files of the host through /proc/PID/fd")
	}
	version, err := ll.LandlockGetABIVersion()
	if err != nil || version < 1 {
		return "", errors.New("not in this kernel, or not enabled at boot")
	}
	err = landlock.V5.BestEffort().Restrict(
		landlock.PathAccess(readOnly, "/"),
		landlock.RWFiles("/dev/null").IgnoreIfMissing(),
		landlock.RWDirs(opt.WritableDirs...),
		// To remove a writable directory itself takes this right on its parent; rmdir takes empty ones only.
		landlock.PathAccess(landlock.AccessFSSet(ll.AccessFSRemoveDir), parents(opt.WritableDirs)...),
	)
	if err != nil {
		return "", err
	}
	got := "files are read-only outside the writable directories"
	if version >= 4 {
		got += ", no TCP"
	}
	return got, nil
}

func parents(dirs []string) []string {
	var up []string
	for _, dir := range dirs {
		up = append(up, filepath.Dir(dir))
	}
	return up
}

func denySyscalls(Options) (string, error) {
	// Both filters go to all threads from this one, which must not change in between.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return "", err
	}
	if err := loadDenyList(); err != nil {
		return "", err
	}
	if err := denyForeignCalls(); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d system calls denied, starting programs and reading other processes among them", len(denied)), nil
}
