package watch

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// manyBorn is how many new numbers are looked up singly; for more the tree is walked.
const manyBorn = 64

// tree finds the descendants of a process.
type tree struct {
	root     int
	children bool // the kernel lists children (CONFIG_PROC_CHILDREN)
	load     int  // /proc/loadavg, kept open
	// The newest process number handed out, as of the last look and of the one before.
	last, before int
}

func newTree(root int) tree {
	_, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d/children", root, root))
	load, openErr := unix.Open("/proc/loadavg", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if openErr != nil {
		load = -1
	}
	return tree{root: root, children: err == nil, load: load}
}

func (t *tree) release() { closeAll(&t.load) }

// born returns the range of numbers, from excluded, that were handed out since the look before
// the last one, which spares walking the tree; false when it must be walked. Every number is
// returned twice because one is handed out a little before its process can be seen.
func (t *tree) born() (from, to int, ok bool) {
	from, to = t.before, t.newest()
	t.before, t.last = t.last, to
	return from, to, from > 0 && from <= to && to-from <= manyBorn
}

// newest reads the last field of loadavg; zero when it cannot be read.
func (t *tree) newest() int {
	var buf [128]byte
	n, err := unix.Pread(t.load, buf[:], 0)
	if err != nil {
		return 0
	}
	text := bytes.TrimSpace(buf[:n])
	number, _ := strconv.Atoi(string(text[bytes.LastIndexByte(text, ' ')+1:]))
	return number
}

// parentOf returns a process's parent; zero for a thread and for what is gone.
func parentOf(pid int) int {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil || number(text, "Tgid") != int64(pid) {
		return 0
	}
	return int(number(text, "PPid"))
}

// walk returns all descendants, each with its parent.
func (t *tree) walk() map[int]int {
	list := t.listed
	if !t.children {
		parents := scanParents()
		list = func(pid int) []int { return parents[pid] }
	}
	found := map[int]int{}
	queue := []int{t.root}
	for len(queue) > 0 {
		parent := queue[0]
		queue = queue[1:]
		for _, pid := range list(parent) {
			if _, known := found[pid]; !known && pid != t.root {
				found[pid] = parent
				queue = append(queue, pid)
			}
		}
	}
	return found
}

// listed reads the children of every thread: each thread has its own.
func (t *tree) listed(pid int) []int {
	dir := "/proc/" + strconv.Itoa(pid) + "/task"
	var pids []int
	for _, thread := range numbersIn(dir) {
		text, err := os.ReadFile(dir + "/" + strconv.Itoa(thread) + "/children")
		if err != nil {
			continue
		}
		for _, field := range bytes.Fields(text) {
			if child, err := strconv.Atoi(string(field)); err == nil {
				pids = append(pids, child)
			}
		}
	}
	return pids
}

func scanParents() map[int][]int {
	children := map[int][]int{}
	for _, pid := range numbersIn("/proc") {
		if s, err := readStat(pid); err == nil {
			children[s.parent] = append(children[s.parent], pid)
		}
	}
	return children
}

// numbersIn lists a folder's entries that are numbers; none when it cannot be read.
func numbersIn(dir string) []int {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1)
	numbers := make([]int, 0, len(names))
	for _, name := range names {
		if n, err := strconv.Atoi(name); err == nil {
			numbers = append(numbers, n)
		}
	}
	return numbers
}
