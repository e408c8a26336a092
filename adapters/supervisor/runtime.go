package supervisor

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	dirPrefix = "kvshield-"
	lockName  = "lock"
	// socketPathMax is what a Unix socket's path can have, less room for the longest name used below the directory.
	socketPathMax = 107 - 48
)

// RuntimeDir is a directory closed to other users that holds the sockets of one run. It is removed at the end of the
// run, by the enclave process if the supervisor was killed, or by the next run.
type RuntimeDir struct {
	root string
	lock *os.File
}

// NewRuntimeDir makes one below base and removes those that dead runs of this user left there. An empty base is chosen.
func NewRuntimeDir(base string) (*RuntimeDir, error) {
	if base == "" {
		base = runtimeBase()
	} else if !fitsRuntime(base) {
		return nil, fmt.Errorf("%s cannot hold a runtime directory; it has to be a directory with a path of at most %d bytes, without spaces and colons", base, socketPathMax)
	}
	removeStale(base)
	root, err := os.MkdirTemp(base, dirPrefix)
	if err != nil {
		return nil, fmt.Errorf("cannot make a runtime directory: %w", err)
	}
	d := &RuntimeDir{root: root}
	if d.lock, err = lock(root); err != nil {
		os.RemoveAll(root)
		return nil, fmt.Errorf("cannot lock the runtime directory: %w", err)
	}
	return d, nil
}

// runtimeBase is the user's runtime directory where there is one and a socket's path fits below it.
func runtimeBase() string {
	for _, dir := range RuntimeBases() {
		if fitsRuntime(dir) {
			return dir
		}
	}
	return "/tmp"
}

// RuntimeBases are where runs make their directories unless they are told another place.
func RuntimeBases() []string { return []string{os.Getenv("XDG_RUNTIME_DIR"), os.TempDir(), "/tmp"} }

func fitsRuntime(dir string) bool {
	info, err := os.Stat(dir)
	return err == nil && info.IsDir() && len(dir) <= socketPathMax && !strings.ContainsAny(dir, " :")
}

// lock makes a directory's lock. It appears under its name when it is held already: another run that starts at the
// same moment must not take this one for dead.
func lock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockName+".new"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err = hold(f); err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, lockName))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func hold(f *os.File) error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) }

// removeStale removes this user's directories whose lock nobody holds. Others share the base directory: what is not
// ours, or open to them, is let alone.
func removeStale(base string) {
	dirs, _ := filepath.Glob(filepath.Join(base, dirPrefix+"*"))
	for _, dir := range dirs {
		if !isOwn(dir) {
			continue
		}
		f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if hold(f) == nil {
			os.RemoveAll(dir)
		}
		f.Close()
	}
}

func isOwn(dir string) bool {
	var st unix.Stat_t
	err := unix.Lstat(dir, &st)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Mode&0o077 == 0 && st.Uid == uint32(os.Getuid())
}

// Root of the directory.
func (d *RuntimeDir) Root() string { return d.root }

// Path of a file in the directory.
func (d *RuntimeDir) Path(name string) string { return filepath.Join(d.root, name) }

// Remove removes the directory.
func (d *RuntimeDir) Remove() {
	os.RemoveAll(d.root)
	d.lock.Close()
}

// availableMemory is what the kernel says can be used without swapping, in bytes.
func availableMemory() (int64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "MemAvailable:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/meminfo does not say")
}
