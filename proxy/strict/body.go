package strict

import (
	"bytes"
	"strconv"
)

// maxLine of a chunk's size or of a trailer.
const maxLine = 4096

type state int

const (
	done state = iota
	sizeLine
	data
	dataEnd
	trailer
)

// body is what is still to come of a request: so many bytes, or chunks.
type body struct {
	left    int64
	chunked bool
	state   state
	line    []byte // of the line that is being read
}

func (b *body) over() bool {
	if b.chunked {
		return b.state == done
	}
	return b.left == 0
}

// take says how many of the bytes belong to the body. It is false when they are not what a body is made of.
func (b *body) take(p []byte) (int, bool) {
	if !b.chunked {
		n := min(b.left, int64(len(p)))
		b.left -= n
		return int(n), true
	}
	taken := 0
	for taken < len(p) && b.state != done {
		if b.state == data {
			n := min(b.left, int64(len(p)-taken))
			b.left -= n
			taken += int(n)
			if b.left == 0 {
				b.state = dataEnd
			}
			continue
		}
		b.line = append(b.line, p[taken])
		taken++
		if len(b.line) > maxLine || !b.lineSound() {
			return 0, false
		}
		if bytes.HasSuffix(b.line, []byte("\r\n")) {
			line := string(b.line[:len(b.line)-2])
			b.line = b.line[:0]
			if !b.next(line) {
				return 0, false
			}
		}
	}
	return taken, true
}

// lineSound is false as soon as a line cannot end in CR LF alone.
func (b *body) lineSound() bool {
	n := len(b.line)
	last := b.line[n-1]
	if last == '\n' {
		return n >= 2 && b.line[n-2] == '\r'
	}
	return n < 2 || b.line[n-2] != '\r'
}

func (b *body) next(line string) bool {
	switch b.state {
	case sizeLine:
		size, err := strconv.ParseUint(line, 16, 62)
		if err != nil || len(line) > 15 || line[0] == '+' {
			return false // extensions among them: nobody who talks to an engine has a use for one
		}
		b.left, b.state = int64(size), data
		if size == 0 {
			b.state = trailer
		}
	case dataEnd:
		if line != "" {
			return false
		}
		b.state = sizeLine
	case trailer:
		if line != "" {
			return false // trailers are refused as extensions are
		}
		b.state = done
	}
	return true
}
