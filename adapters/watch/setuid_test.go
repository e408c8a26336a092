package watch_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/watch"
)

const helperEnv = "KVSHIELD_WATCH_TEST_HELPER"

func setuidCopy(t *testing.T, b bench) string {
	t.Helper()
	text, err := os.ReadFile(b.dynamic)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(b.dir, "setuid")
	if err := os.WriteFile(path, text, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	return path
}

// watchAsOrdinaryUser is the test binary executed anew as an ordinary user: it watches a setuid
// program, which is closed to it, and prints what it found.
func watchAsOrdinaryUser() int {
	args := strings.Split(os.Getenv(helperEnv), "\n")
	found := make(chan watch.Violation, 1)
	w := watch.New(watch.Config{
		Root: os.Getpid(), Hook: "libkvshield.so",
		Greeted:  func(int) bool { return false },
		Violated: func(v watch.Violation) { found <- v },
	})
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go w.Run(ctx)
	host := exec.Command(args[0], args[1:]...)
	if err := host.Start(); err != nil {
		fmt.Println(err)
		return 1
	}
	defer host.Wait()
	defer host.Process.Kill()
	select {
	case v := <-found:
		fmt.Println(v.Cause, v.Evidence, v.Kill)
		return 0
	case <-time.After(patience):
		fmt.Println("not ended")
		return 1
	}
}

func TestSetuidProgramThatIsGivenAModelIsEnded(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("making a setuid program of another user needs root")
	}
	b := newBench(t)
	program := setuidCopy(t, b)
	self := filepath.Join(b.dir, "self")
	copyFile(t, os.Args[0], self)
	for dir := b.dir; dir != filepath.Dir(filepath.Clean(os.TempDir())) && dir != "/"; dir = filepath.Dir(dir) {
		if dir == filepath.Clean(os.TempDir()) {
			break
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const nobody = 65534
	cmd := exec.Command(self)
	cmd.Dir = b.dir
	cmd.Env = []string{helperEnv + "=" + program + "\nmap\n" + b.big}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	want := "setuid program was given it on its command line, cannot be looked into, and goes on <nil>\n"
	if err != nil || string(out) != want {
		t.Errorf("%v: %q, want %q", err, out, want)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
}
