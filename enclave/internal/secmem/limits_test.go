package secmem

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const nobody = 65534

// vmFlags returns the kernel's flags of the mapping that starts at an address.
func vmFlags(t *testing.T, at int64) string {
	smaps, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer smaps.Close()
	start, inside := fmt.Sprintf("%x-", at), false
	for lines := bufio.NewScanner(smaps); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), start) {
			inside = true
		}
		if flags, ok := strings.CutPrefix(lines.Text(), "VmFlags: "); ok && inside {
			return strings.TrimSpace(flags)
		}
	}
	t.Fatalf("no mapping starts at %s", start)
	return ""
}

func TestMain(m *testing.M) {
	if os.Getenv("SECMEM_TEST_CHILD") != "" {
		reportKind()
		return
	}
	os.Exit(m.Run())
}

// reportKind is the child process: it may lock nothing, and says what it got all the same.
func reportKind() {
	none := unix.Rlimit{}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &none); err != nil {
		fmt.Println(err)
		return
	}
	r, err := New(32)
	if err != nil {
		fmt.Println(err)
		return
	}
	copy(r.Bytes(), "usable")
	fmt.Printf("%s %s", r.Kind(), r.Bytes()[:6])
}

func TestWithoutLockedMemoryItSaysPlain(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "SECMEM_TEST_CHILD=1")
	cmd.Dir = "/"
	if os.Getuid() == 0 { // root may lock whatever the limit says
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Logf("%s", exit.Stderr)
		}
		t.Fatal(err)
	}
	if string(out) != "plain usable" {
		t.Errorf("the child says %q, want %q", out, "plain usable")
	}
}
