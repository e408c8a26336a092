package bench

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// copyName is how the kernel shows the memory files of shielded models.
const copyName = "/memfd:kvshield-model"

// usage is the memory of one process, in bytes. Pages shared by n processes count one nth in each.
type usage struct {
	held     int64            // proportional set size with swapped pages, less the copies
	files    int64            // what of it is mapped files
	copies   map[uint64]int64 // shares of memory files of shielded models, by inode
	resident bool             // held is the resident set: the shares are hidden from this user
}

// readUsage returns nothing for a process that is gone.
func readUsage(pid int) usage {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err == nil {
		return parseSmaps(text)
	}
	// The enclave lets nobody but root look at its maps; its size is public.
	if text, err = os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err == nil {
		return parseStatus(text)
	}
	return usage{}
}

// parseSmaps adds up /proc/PID/smaps, leaving out lines it does not know.
func parseSmaps(text []byte) usage {
	u := usage{copies: map[uint64]int64{}}
	var m mapping
	for line := range bytes.Lines(text) {
		if next, ok := parseMapping(line); ok {
			u.add(m)
			m = next
			continue
		}
		name, bytes := parseSize(line)
		switch name {
		case "Pss":
			m.share = bytes
		case "SwapPss":
			m.swapped = bytes
		case "Anonymous":
			m.anonymous = bytes
		}
	}
	u.add(m)
	return u
}

// mapping is one entry of smaps.
type mapping struct {
	inode                     uint64
	path                      string
	share, swapped, anonymous int64
}

func (u *usage) add(m mapping) {
	if strings.HasPrefix(m.path, copyName) {
		u.copies[m.inode] += m.share + m.swapped
		return
	}
	u.held += m.share + m.swapped
	if strings.HasPrefix(m.path, "/") && !strings.HasPrefix(m.path, "/memfd:") {
		u.files += max(0, m.share-m.anonymous)
	}
}

// parseMapping reads the line that begins an entry: addresses, rights, offset, device, inode and perhaps a path.
func parseMapping(line []byte) (mapping, bool) {
	fields := strings.Fields(string(line))
	if len(fields) < 5 || !strings.Contains(fields[0], "-") || strings.HasSuffix(fields[0], ":") {
		return mapping{}, false
	}
	inode, err := strconv.ParseUint(fields[4], 10, 64)
	if err != nil {
		return mapping{}, false
	}
	return mapping{inode: inode, path: strings.Join(fields[5:], " ")}, true
}

// parseSize reads "Name:   12 kB".
func parseSize(line []byte) (name string, size int64) {
	fields := strings.Fields(string(line))
	if len(fields) != 3 || fields[2] != "kB" {
		return "", 0
	}
	kib, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil || kib < 0 {
		return "", 0
	}
	return strings.TrimSuffix(fields[0], ":"), kib << 10
}

// parseStatus takes the resident set from /proc/PID/status, shared pages in full.
func parseStatus(text []byte) usage {
	u := usage{resident: true}
	for line := range bytes.Lines(text) {
		switch name, size := parseSize(line); name {
		case "RssAnon", "RssShmem", "VmSwap":
			u.held += size
		case "RssFile":
			u.held += size
			u.files += size
		}
	}
	return u
}

// openCopies lists the memory files of shielded models that a process holds open: how many bytes each holds, by inode.
func openCopies(pid int) map[uint64]int64 {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	found := map[uint64]int64{}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if target, err := os.Readlink(path); err != nil || !strings.HasPrefix(target, copyName) {
			continue
		}
		var st syscall.Stat_t
		if syscall.Stat(path, &st) == nil {
			found[st.Ino] = st.Blocks * 512
		}
	}
	return found
}
