package tee

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

const nobody = 65534

// start runs a child until the end of the test and returns its process and what it reported.
func start(t *testing.T, do task, as *syscall.Credential, files ...*os.File) (*exec.Cmd, seen) {
	t.Helper()
	text, err := json.Marshal(do)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	cmd.Dir, cmd.Stderr, cmd.ExtraFiles = "/", os.Stderr, files
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_, _ = io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the child ended badly: %v", err)
		}
	})
	var saw seen
	if err := json.NewDecoder(out).Decode(&saw); err != nil {
		t.Fatalf("the child reported nothing: %v", err)
	}
	if saw.Error != "" {
		t.Fatal(saw.Error)
	}
	return cmd, saw
}

// host sets up what a child tries to reach, and runs it.
func host(t *testing.T, do task) (*exec.Cmd, seen) {
	t.Helper()
	do.Inside, do.Outside = t.TempDir(), t.TempDir()
	do.Options.WritableDirs = []string{do.Inside}
	for _, file := range []string{do.Inside + "/old", do.Outside + "/old", do.Outside + "/victim"} {
		if err := os.WriteFile(file, []byte("content"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	accept(t, "unix", filepath.Join(do.Inside, "host"))
	do.TCP = accept(t, "tcp", "127.0.0.1:0")
	fd, err := unix.MemfdCreate("tee-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	memfd := os.NewFile(uintptr(fd), "memfd")
	t.Cleanup(func() { memfd.Close() })
	do.Memfd = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
	return start(t, do, nil, memfd)
}

func accept(t *testing.T, network, address string) string {
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

func needLandlock(t *testing.T) {
	if v, err := ll.LandlockGetABIVersion(); err != nil || v < 4 {
		t.Skipf("this kernel has Landlock version %d, the test needs 4", v)
	}
}

func TestWhatAHardenedProcessCanStillDo(t *testing.T) {
	needLandlock(t)
	anyone := map[string]string{
		"write inside": "ok", "remove inside": "ok", "listen inside": "ok", "connect inside": "ok",
		"read outside": "ok", "inherited memfd": "ok", "allocate and return": "ok",
	}
	confined := map[string]string{
		"write outside": "EACCES", "truncate outside": "EACCES", "remove outside": "EACCES",
		"listen outside": "EACCES", "connect over TCP": "EACCES", "memfd of the host": "EACCES",
		"start a program": "EPERM", "trace a process": "EPERM", "read a process": "EPERM", "become dumpable": "EPERM",
	}
	hostFiles := map[string]string{
		"write outside": "ok", "truncate outside": "ok", "remove outside": "ok",
		"listen outside": "ok", "connect over TCP": "ok", "memfd of the host": "ok",
		"start a program": "EPERM", "trace a process": "EPERM", "read a process": "EPERM", "become dumpable": "EPERM",
	}
	bystander := map[string]string{
		"write outside": "ok", "truncate outside": "ok", "remove outside": "ok",
		"listen outside": "ok", "connect over TCP": "ok", "memfd of the host": "ok",
		"start a program": "ok", "trace a process": "ESRCH", "read a process": "ok", "become dumpable": "ok",
	}
	cases := []struct {
		name string
		do   task
		want map[string]string
	}{
		{"confined", task{Role: "hardened"}, confined},
		{"host files", task{Role: "hardened", Options: Options{HostFiles: true}}, hostFiles},
		{"not hardened", task{Role: "bystander"}, bystander},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, saw := host(t, c.do)
			for _, want := range []map[string]string{anyone, c.want} {
				for name, outcome := range want {
					if got := saw.Attempts[name]; got != outcome {
						t.Errorf("%s: %s, want %s", name, got, outcome)
					}
				}
			}
			if n := len(anyone) + len(c.want); n != len(saw.Attempts) {
				t.Errorf("%d attempts were made, %d are judged", len(saw.Attempts), n)
			}
		})
	}
}

func TestWhatTheKernelSaysOfAHardenedProcess(t *testing.T) {
	_, saw := host(t, task{Role: "hardened"})
	if saw.Dumpable {
		t.Error("the process is dumpable")
	}
	if saw.CoreMax != 0 {
		t.Errorf("core files may have %d bytes", saw.CoreMax)
	}
	if saw.Threads < 5 || saw.NoNewPriv != saw.Threads {
		t.Errorf("%d of %d threads have no_new_privs", saw.NoNewPriv, saw.Threads)
	}
	if saw.Filters["0"] != 0 || saw.Filters["1"] != 0 || len(saw.Filters) != 1 {
		t.Errorf("threads by number of seccomp filters: %v, want all with the same two or more", saw.Filters)
	}
}

// Every measure is accounted for once, as obtained or as missing.
func TestReportAccountsForEveryMeasure(t *testing.T) {
	for _, hostFiles := range []bool{false, true} {
		_, saw := host(t, task{Role: "hardened", Options: Options{HostFiles: hostFiles}})
		all := slices.Concat(saw.Report.Hardening, saw.Report.Missing)
		for _, m := range measures {
			lines := 0
			for _, line := range all {
				if strings.HasPrefix(line, m.name+": ") {
					lines++
				}
			}
			if lines != 1 {
				t.Errorf("%q is reported %d times in %q", m.name, lines, all)
			}
		}
		leftOut := slices.ContainsFunc(saw.Report.Missing, func(s string) bool {
			return strings.HasPrefix(s, "landlock: left out")
		})
		if leftOut != hostFiles {
			t.Errorf("host files %v: missing is %q", hostFiles, saw.Report.Missing)
		}
	}
}

// Root passes every check on ptrace, so the attacker and its target are an ordinary user here.
func TestSameUserCannotReachTheProcess(t *testing.T) {
	var user *syscall.Credential
	if os.Getuid() == 0 {
		user = &syscall.Credential{Uid: nobody, Gid: nobody}
	}
	probe := func(role string) map[string]string {
		cmd, _ := start(t, task{Role: role}, user)
		_, saw := start(t, task{Role: "attacker", Target: cmd.Process.Pid}, user)
		return saw.Attempts
	}
	if open := probe("bystander"); open["mem"] != "ok" || open["attach"] != "ok" {
		t.Skipf("this kernel keeps processes of one user apart anyway: %v", open)
	}
	want := map[string]string{"mem": "EACCES", "maps": "EACCES", "attach": "EPERM"}
	got := probe("hardened")
	for name, outcome := range want {
		if got[name] != outcome {
			t.Errorf("%s of a hardened process: %s, want %s", name, got[name], outcome)
		}
	}
}

func TestRootCannotReadSecretMemory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: nobody else opens the memory of a hardened process")
	}
	cmd, saw := host(t, task{Role: "hardened"})
	if saw.SecretAt == 0 {
		t.Skip("this kernel has no secret memory")
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	buf := make([]byte, len(keyBytes))
	if _, err := mem.ReadAt(buf, saw.SecretAt); err == nil || string(buf) == keyBytes {
		t.Errorf("root read %q, %v from secret memory", buf, err)
	}
	// The contrast, and the reason for secmem: the Go heap is open to root.
	if _, err := mem.ReadAt(buf, saw.HeapAt); err != nil || string(buf) != keyBytes {
		t.Errorf("root read %q, %v from the heap", buf, err)
	}
}

func TestSmallLimitOnLockedMemoryIsReported(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to become a user without CAP_IPC_LOCK")
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil || limit.Cur == unix.RLIM_INFINITY {
		t.Skipf("locked memory is not limited here (%v)", err)
	}
	_, saw := start(t, task{Role: "hardened"}, &syscall.Credential{Uid: nobody, Gid: nobody})
	if !slices.ContainsFunc(saw.Report.Missing, func(s string) bool { return strings.HasPrefix(s, "locked memory: ") }) {
		t.Errorf("missing is %q, want locked memory in it", saw.Report.Missing)
	}
	if saw.Attempts["allocate and return"] != "ok" {
		t.Error("the process cannot allocate")
	}
}
