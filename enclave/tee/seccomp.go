package tee

import (
	"fmt"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// denied are calls that the enclave never makes and that would let code smuggled into it start
// programs, read other processes, or change the system. They fail with EPERM.
var denied = []string{
	"execve", "execveat",
	"ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd",
	"bpf", "perf_event_open", "userfaultfd",
	// Requests in an io_uring bypass seccomp.
	"io_uring_setup", "io_uring_enter", "io_uring_register",
	"mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsmount", "setns", "unshare",
	"kexec_load", "init_module", "finit_module", "delete_module", "reboot", "swapon", "swapoff",
	"keyctl", "add_key", "request_key",
}

// loadDenyList also keeps the process from becoming dumpable again.
func loadDenyList() error {
	dumpable := seccomp.Condition{Argument: 0, Operation: seccomp.Equal, Value: unix.PR_SET_DUMPABLE}
	return seccomp.LoadFilter(seccomp.Filter{
		Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionAllow,
			Syscalls: []seccomp.SyscallGroup{{
				Action: seccomp.ActionErrno,
				Names:  denied,
				NamesWithCondtions: []seccomp.NameWithConditions{
					{Name: "prctl", Conditions: seccomp.ArgumentConditions{dumpable}},
				},
			}},
		},
	})
}

// denyForeignCalls closes the calls of another architecture (32-bit calls of a 64-bit process),
// which have other numbers and which the deny list lets through.
func denyForeignCalls() error {
	native, err := arch.GetInfo("")
	if err != nil {
		return fmt.Errorf("this architecture has no table of system calls: %w", err)
	}
	const archOffset = 4 // of seccomp_data.arch
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: archOffset},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: uint32(native.ID)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return fmt.Errorf("denying calls of other architectures failed: %w", errno)
	}
	return nil
}
