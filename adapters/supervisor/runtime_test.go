package supervisor

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRuntimeDirIsClosedToOthersAndRemoved(t *testing.T) {
	dir := base(t)
	d, err := NewRuntimeDir("")
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(d.Root())
	if err != nil || info.Mode().Perm() != 0o700 || filepath.Dir(d.Root()) != dir {
		t.Errorf("%s: %v, %v", d.Root(), info.Mode(), err)
	}
	d.Remove()
	if !gone(d.Root()) {
		t.Error("it is still there")
	}
}

func TestStaleRuntimeDirs(t *testing.T) {
	dir := base(t)
	live, err := NewRuntimeDir("")
	if err != nil {
		t.Fatal(err)
	}
	defer live.Remove()
	make := func(name string, mode os.FileMode, lock bool) string {
		path := filepath.Join(dir, name)
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if lock {
			if err := os.WriteFile(filepath.Join(path, lockName), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	dead := make("kvshield-dead", 0o700, true)
	starting := make("kvshield-starting", 0o700, false)
	shared := make("kvshield-shared", 0o755, true)
	other := make("other-dead", 0o700, true)
	linked := make("kvshield-linked", 0o700, false)
	target := filepath.Join(dir, "target")
	if err := os.Symlink(target, filepath.Join(linked, lockName)); err != nil {
		t.Fatal(err)
	}
	fifo := make("kvshield-fifo", 0o700, false)
	if err := unix.Mkfifo(filepath.Join(fifo, lockName), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other, filepath.Join(dir, "kvshield-link")); err != nil {
		t.Fatal(err)
	}

	next, err := NewRuntimeDir("")
	if err != nil {
		t.Fatal(err)
	}
	defer next.Remove()
	if !gone(dead) {
		t.Error("a dead run's directory was kept")
	}
	for what, path := range map[string]string{"a live run": live.Root(), "a starting run": starting, "a directory open to others": shared,
		"something else": other, "a directory whose lock is a link": linked} {
		if gone(path) {
			t.Errorf("removed: %s", what)
		}
	}
	if !gone(target) {
		t.Error("a link named lock was followed and its target made")
	}
}

func TestRunsThatStartTogetherLetEachOtherLive(t *testing.T) {
	base(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				d, err := NewRuntimeDir("")
				if err != nil {
					t.Error(err)
					return
				}
				if gone(d.Path(lockName)) {
					t.Error("a directory was removed while its run lived")
				}
				d.Remove()
			}
		})
	}
	wg.Wait()
}

func TestRuntimeBaseMustFitASocket(t *testing.T) {
	long := filepath.Join(t.TempDir(), "a-directory-with-a-name-that-leaves-no-room-for-a-socket-below-it")
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{long, "/absent", "", "/etc/passwd"} {
		t.Setenv("XDG_RUNTIME_DIR", dir)
		t.Setenv("TMPDIR", "/tmp")
		if got := runtimeBase(); got != "/tmp" {
			t.Errorf("with XDG_RUNTIME_DIR %q: %q", dir, got)
		}
	}
}

func TestAvailableMemory(t *testing.T) {
	if n, err := availableMemory(); err != nil || n < 1<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
}
