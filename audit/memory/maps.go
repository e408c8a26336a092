package memory

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
)

var errMaps = errors.New("list of mappings is malformed")

// mapping is one line of /proc/PID/maps, described in proc_pid_maps(5).
type mapping struct {
	span
	mode  string // such as "rw-p"
	inode uint64 // 0: no file
	path  string
}

// parseMaps reads /proc/PID/maps: mappings in ascending order that do not overlap.
func parseMaps(r io.Reader) ([]mapping, error) {
	var out []mapping
	before := uint64(0)
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		m, err := parseMapping(lines.Text())
		if err == nil && (m.start < before || m.end < m.start) {
			err = errMaps
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %.80q", err, lines.Text())
		}
		before = m.end
		out = append(out, m)
	}
	return out, lines.Err()
}

func parseMapping(line string) (m mapping, err error) {
	fields := make([]string, 5)
	for i := range fields {
		fields[i], line, _ = strings.Cut(line, " ")
	}
	from, to, _ := strings.Cut(fields[0], "-")
	var errs [3]error
	m.start, errs[0] = strconv.ParseUint(from, 16, 64)
	m.end, errs[1] = strconv.ParseUint(to, 16, 64)
	m.inode, errs[2] = strconv.ParseUint(fields[4], 10, 64)
	m.sparse = m.inode == 0
	m.mode, m.path = fields[1], strings.TrimLeft(line, " ")
	if errors.Join(errs[:]...) != nil || len(m.mode) != 4 {
		return m, errMaps
	}
	return m, nil
}

// worthReading tells what may hold a cache from what cannot: mappings that may not be read, the kernel's own pages, and files that
// are only read, such as libraries and the model.
func (m *mapping) worthReading() bool {
	switch {
	case m.mode[0] != 'r', m.end > math.MaxInt64, strings.HasPrefix(m.path, "[vvar"), m.path == "[vsyscall]":
		return false
	case m.mode[1] == 'w', m.inode == 0:
		return true
	}
	return !m.isFile()
}

// isFile is false for memory and devices that the kernel shows as files: somebody else may write to them.
func (m *mapping) isFile() bool {
	for _, prefix := range []string{"/dev/", "/memfd:", "/SYSV", "anon_inode:"} {
		if strings.HasPrefix(m.path, prefix) {
			return false
		}
	}
	return strings.HasPrefix(m.path, "/") && !strings.HasSuffix(m.path, " (deleted)")
}

// choose joins what is worth reading into spans as long as possible, so that a row across the border of two of a kind is found, and
// says how many bytes were left out.
func choose(mappings []mapping) (spans []span, total, skipped uint64) {
	for _, m := range mappings {
		switch n := len(spans); {
		case !m.worthReading():
			skipped += m.end - m.start
			continue
		case n > 0 && spans[n-1].end == m.start && spans[n-1].sparse == m.sparse:
			spans[n-1].end = m.end
		default:
			spans = append(spans, m.span)
		}
		total += m.end - m.start
	}
	return spans, total, skipped
}
