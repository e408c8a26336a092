package watch

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// stat is what the watch needs of /proc/PID/stat.
type stat struct {
	parent int
	start  uint64 // clock ticks after boot: with the number, the identity of a process
	stack  uint64 // where the stack starts; zero when hidden
}

var errStat = errors.New("unexpected form of a stat file")

func readStat(pid int) (stat, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, err
	}
	return parseStat(text)
}

// parseStat skips the program's name, which may hold blanks and parentheses.
func parseStat(text []byte) (stat, error) {
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	const firstField, parent, start, stack = 3, 4, 22, 28
	if len(fields) <= stack-firstField {
		return stat{}, errStat
	}
	var s stat
	var errs [3]error
	s.parent, errs[0] = strconv.Atoi(string(fields[parent-firstField]))
	s.start, errs[1] = strconv.ParseUint(string(fields[start-firstField]), 10, 64)
	s.stack, errs[2] = strconv.ParseUint(string(fields[stack-firstField]), 10, 64)
	if errors.Join(errs[:]...) != nil {
		return stat{}, errStat
	}
	return s, nil
}

// mapping is one file-backed line of /proc/PID/maps.
type mapping struct {
	addresses string // as the kernel writes them, a name in /proc/PID/map_files
	length    int64
	offset    int64
	runnable  bool
	file      mapID
	path      string
}

// mapID names a file within the maps of one process. Device numbers of maps and of stat differ on
// some file systems, so it is not compared with anything else.
type mapID struct {
	dev   string
	inode uint64
}

// parseMapping reads one line; false for anonymous memory and for what is not such a line.
func parseMapping(line []byte) (mapping, bool) {
	var m mapping
	var field [5][]byte
	for i := range field {
		line = bytes.TrimLeft(line, " ")
		end := bytes.IndexByte(line, ' ')
		if end < 0 {
			end = len(line)
		}
		field[i], line = line[:end], line[end:]
	}
	from, to, ok := bytes.Cut(field[0], []byte("-"))
	start, err1 := strconv.ParseUint(string(from), 16, 63)
	stop, err2 := strconv.ParseUint(string(to), 16, 63)
	offset, err3 := strconv.ParseInt(string(field[2]), 16, 64)
	// Anonymous memory has no inode.
	inode, err4 := strconv.ParseUint(string(field[4]), 10, 64)
	if !ok || inode == 0 || stop < start || offset < 0 || errors.Join(err1, err2, err3, err4) != nil {
		return m, false
	}
	return mapping{
		addresses: string(field[0]), length: int64(stop - start), offset: offset,
		runnable: bytes.IndexByte(field[1], 'x') >= 0,
		file:     mapID{string(field[3]), inode},
		path:     string(bytes.TrimLeft(line, " ")),
	}, true
}

// number finds "key: N" in a text of such lines (io, fdinfo).
func number(text []byte, key string) int64 {
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte(key+":")); ok {
			n, _ := strconv.ParseInt(string(bytes.TrimSpace(rest)), 10, 64)
			return n
		}
	}
	return 0
}

func closeAll(fds ...*int) {
	for _, fd := range fds {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}
