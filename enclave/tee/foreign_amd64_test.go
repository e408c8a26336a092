package tee

import (
	"os"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// getpid32 is getpid by the number and the gate of 32-bit programs.
var getpid32 = []byte{
	0xb8, 20, 0, 0, 0, // mov eax, 20
	0xcd, 0x80, // int 0x80
	0x48, 0x98, // cdqe
	0xc3, // ret
}

func init() { foreignCall = call32 }

func call32() error {
	page, err := unix.Mmap(-1, 0, len(getpid32), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(page)
	copy(page, getpid32)
	if err := unix.Mprotect(page, unix.PROT_READ|unix.PROT_EXEC); err != nil {
		return err
	}
	entry := uintptr(unsafe.Pointer(&page[0]))
	closure := &entry // a Go function value points to the address of its code
	if got := (*(*func() int64)(unsafe.Pointer(&closure)))(); got < 0 {
		return syscall.Errno(-got)
	}
	return nil
}

func TestCallsOfAnotherArchitectureAreDenied(t *testing.T) {
	if _, err := os.Stat("/proc/sys/abi/vsyscall32"); err != nil {
		t.Skip("this kernel runs no 32-bit calls")
	}
	for role, want := range map[string]string{"bystander": "ok", "hardened": "EPERM"} {
		if _, saw := host(t, task{Role: role, Foreign: true}); saw.Attempts["foreign call"] != want {
			t.Errorf("%s: %s, want %s", role, saw.Attempts["foreign call"], want)
		}
	}
}
