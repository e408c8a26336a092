package watch

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// process is one watched process.
type process struct {
	pid, parent int
	start       uint64
	exempt      bool
	ended       bool
	kin         uint64 // where the stack lay when it was found to be a copy of a greeted process

	statm, io int // kept open: cheap to read, and bound to the process, not to its number
	print     print
	turn      bool // which counter of a sleeping process was read last
	execution execution

	seen, changed, scanned, due time.Time
	cost                        time.Duration

	hooked     bool // the hook's library is mapped
	undecided  bool // something about its files is still being found out
	unreadable bool
	readBefore int64    // bytes it had read at the last scan
	readByLast int64    // bytes it had read when its program was executed
	named      []*model // on its command line; nil before that was read
	arguments  []string // its command line, read with named
	mapped     map[*model]int64
	reading    map[*model]*reading
	objects    []object
	known      map[mapID]*model
}

// object is code in a process: its program or a library.
type object struct{ link, path string }

// print is what changes when a process reads or maps anything. To open a file alone does no harm.
type print struct {
	read int64 // bytes read since its start
	size string
}

// newProcess returns nil for a process that is gone already.
func newProcess(pid, parent int, now time.Time) *process {
	s, err := readStat(pid)
	if err != nil {
		return nil
	}
	p := &process{pid: pid, parent: parent, start: s.start, seen: now, changed: now, due: now,
		reading: map[*model]*reading{}, known: map[mapID]*model{}}
	open := func(name string) int {
		fd, err := unix.Open(p.path(name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1
		}
		return fd
	}
	p.statm = open("statm")
	p.io = open("io")
	return p
}

func (p *process) release() { closeAll(&p.statm, &p.io) }

func (p *process) path(name string) string {
	return "/proc/" + strconv.Itoa(p.pid) + "/" + name
}

func (p *process) alive() bool {
	s, err := readStat(p.pid)
	return err == nil && s.start == p.start
}

// fingerprint is false when the process is gone. Of a process that is asleep the two counters are
// read in turn: to execute a program or to open a model as ggml does moves both.
func (p *process) fingerprint(asleep bool) (print, bool) {
	now := p.print
	p.turn = !p.turn
	alive := true
	if !asleep || p.turn {
		now.size, alive = p.size(now.size)
	}
	if !asleep || !p.turn {
		now.read = p.bytesRead(now.read)
	}
	return now, alive
}

// size is false when the process is gone.
func (p *process) size(before string) (string, bool) {
	var buf [64]byte
	n, err := unix.Pread(p.statm, buf[:], 0)
	if err != nil || n == 0 {
		// No descriptor was left for it, or it is gone.
		return before, p.statm < 0 && p.alive()
	}
	size, _, _ := bytes.Cut(buf[:n], []byte(" "))
	if string(size) == before {
		return before, true
	}
	return string(size), true
}

func (p *process) bytesRead(before int64) int64 {
	var buf [256]byte
	n, err := unix.Pread(p.io, buf[:], 0)
	if err != nil {
		return before
	}
	return number(buf[:n], "rchar")
}

// pause says how long the process may be left alone.
func (p *process) pause(now time.Time) time.Duration {
	young := now.Sub(p.seen) < alert
	engaged := len(p.reading)+len(p.mapped) > 0 && now.Sub(p.changed) < alert
	if young || engaged || p.undecided {
		return min(max(engagedPoll, share*p.cost), slowestEngaged)
	}
	return basePoll
}

// asleep says whether nothing has moved in the process for a while.
func (p *process) asleep(now time.Time) bool { return now.Sub(p.changed) > drowsy }

// stale says whether a look is due although nothing moved: a file can be mapped over memory that
// was set aside before.
func (p *process) stale(now time.Time) bool {
	if p.asleep(now) {
		return now.Sub(p.scanned) >= asleepScan
	}
	return now.Sub(p.scanned) >= fullScan
}

// scan finds out which models the process has open and mapped.
func (p *process) scan(files *catalogue, hook string) {
	judged := !p.undecided
	p.undecided = false
	p.scanMaps(files, hook)
	// In a closed process no execution of another program can be told.
	if p.named == nil || p.unreadable {
		p.named = p.namedModels(files)
	}
	p.follow(p.openModels(files), judged)
}

func (p *process) scanMaps(files *catalogue, hook string) {
	text, err := os.ReadFile(p.path("maps"))
	p.unreadable = err != nil
	if err != nil {
		return
	}
	p.hooked, p.mapped, p.objects = false, nil, p.objects[:0]
	first, coded := true, mapID{}
	for line := range bytes.Lines(text) {
		m, ok := parseMapping(bytes.TrimSuffix(line, []byte("\n")))
		if !ok {
			continue
		}
		if first {
			p.executed(execution{m.file, stackEnd(text)})
			first = false
		}
		// The hook names ggml's functions too, and is no engine.
		isHook := sameBase(m.path, hook)
		p.hooked = p.hooked || isHook
		if m.runnable && m.file != coded && !isHook {
			coded = m.file
			p.objects = append(p.objects, object{p.path("map_files/" + m.addresses), m.path})
		}
		p.addMapping(files, m)
	}
}

// execution is one execution of a program. The kernel lays out the stack anew, at a random place,
// for each, which tells it from another of the same program.
type execution struct {
	program mapID
	stack   string
}

// stackEnd returns the upper end of the stack's line in maps: the lower one moves as it grows.
func stackEnd(maps []byte) string {
	at := bytes.LastIndex(maps, []byte("[stack]"))
	if at < 0 {
		return ""
	}
	line := maps[bytes.LastIndexByte(maps[:at], '\n')+1 : at]
	addresses, _, _ := bytes.Cut(line, []byte(" "))
	return string(addresses[bytes.IndexByte(addresses, '-')+1:])
}

// executed starts afresh when the process has executed another program.
func (p *process) executed(e execution) {
	if e == p.execution {
		return
	}
	if p.execution != (execution{}) {
		p.readByLast = p.readBefore
	}
	p.execution, p.known, p.named, p.seen = e, map[mapID]*model{}, nil, p.scanned
}

func (p *process) addMapping(files *catalogue, m mapping) {
	found, known := p.known[m.file]
	if !known {
		found = p.mappedModel(files, m)
		p.known[m.file] = found
	}
	if found == nil {
		return
	}
	data, _, ready := found.tensors()
	if !ready {
		p.undecided = true
		return
	}
	covered := min(m.offset+m.length, found.size) - max(m.offset, data)
	if p.mapped == nil {
		p.mapped = map[*model]int64{}
	}
	p.mapped[found] += max(0, covered)
}

// mappedModel opens what is mapped: directly where the rights suffice, or by its name when that
// still names the same file.
func (p *process) mappedModel(files *catalogue, m mapping) *model {
	link := p.path("map_files/" + m.addresses)
	if _, err := os.Stat(link); err == nil {
		return files.model(link)
	}
	path := p.path("root") + m.path
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Ino != m.file.inode {
		return nil
	}
	return files.model(path)
}

// openModels returns every model that is open for reading and the furthest position in it.
func (p *process) openModels(files *catalogue) map[*model]int64 {
	dir := p.path("fd")
	open := map[*model]int64{}
	for _, fd := range numbersIn(dir) {
		link := dir + "/" + strconv.Itoa(fd)
		m := files.model(link)
		if m == nil || !readable(link) {
			continue
		}
		if _, _, known := m.tensors(); !known {
			p.undecided = true
		}
		info, _ := os.ReadFile(fmt.Sprintf("%s/%d", p.path("fdinfo"), fd))
		open[m] = max(open[m], number(info, "pos"))
	}
	return open
}

// readable says whether a descriptor was opened for reading: its link carries the mode.
func readable(link string) bool {
	var st unix.Stat_t
	return unix.Lstat(link, &st) == nil && st.Mode&unix.S_IRUSR != 0
}

// sameBase compares the last elements of two paths.
func sameBase(path, other string) bool {
	base := func(s string) string {
		for i := len(s) - 1; i >= 0; i-- {
			if s[i] == '/' {
				return s[i+1:]
			}
		}
		return s
	}
	return other != "" && base(path) == base(other)
}
