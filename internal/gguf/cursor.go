package gguf

import (
	"encoding/binary"
	"errors"
	"io"
)

const (
	window = 64 << 10

	// maxHeader is many times what the largest vocabularies take, and read in well under a second.
	maxHeader = 128 << 20
)

// cursor walks forward through a file with one window of it in memory. Every length is checked
// against what is left of the file before anything is done with it.
type cursor struct {
	r    io.ReaderAt
	size int64
	pos  int64
	buf  []byte // what lies at from
	from int64
}

func newCursor(r io.ReaderAt, size int64) *cursor {
	return &cursor{r: r, size: max(size, 0), buf: make([]byte, 0, min(window, max(size, 0)))}
}

func (c *cursor) left() uint64 { return uint64(c.size - c.pos) }

// claim fails unless n more bytes are in the file, and in what a header may be.
func (c *cursor) claim(n uint64) error {
	if n > c.left() {
		return fail(ErrTruncated, c.pos, "%d bytes are needed, %d are left in the file", n, c.left())
	}
	if n > maxHeader || c.pos+int64(n) > maxHeader {
		return fail(ErrUnsupported, c.pos, "header of more than %d MiB", maxHeader>>20)
	}
	return nil
}

// peek returns the next n bytes, at most a window, without passing them.
func (c *cursor) peek(n int) ([]byte, error) {
	if err := c.claim(uint64(n)); err != nil {
		return nil, err
	}
	at := c.pos - c.from
	if at > int64(len(c.buf)) || int64(n) > int64(len(c.buf))-at {
		if err := c.fill(); err != nil {
			return nil, err
		}
		at = 0
	}
	return c.buf[at : at+int64(n)], nil
}

func (c *cursor) fill() error {
	want := min(int64(cap(c.buf)), c.size-c.pos)
	n, err := c.r.ReadAt(c.buf[:want], c.pos)
	if int64(n) < want {
		c.buf = c.buf[:0]
		return readError(err, c.pos+int64(n))
	}
	c.buf, c.from = c.buf[:want], c.pos
	return nil
}

// readError names a read that came back short: the file has shrunk, or cannot be read.
func readError(err error, offset int64) error {
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fail(ErrTruncated, offset, "the file ends earlier than it did when it was opened")
	}
	return fail(err, offset, "the file cannot be read")
}

func (c *cursor) u32() (uint32, error) {
	b, err := c.peek(4)
	if err != nil {
		return 0, err
	}
	c.pos += 4
	return binary.LittleEndian.Uint32(b), nil
}

func (c *cursor) u64() (uint64, error) {
	b, err := c.peek(8)
	if err != nil {
		return 0, err
	}
	c.pos += 8
	return binary.LittleEndian.Uint64(b), nil
}

func (c *cursor) skip(n uint64) error {
	if err := c.claim(n); err != nil {
		return err
	}
	c.pos += int64(n)
	return nil
}

// length reads the length of a string and makes sure that the string is there.
func (c *cursor) length() (uint64, error) {
	n, err := c.u64()
	if err != nil {
		return 0, err
	}
	if n > c.left() {
		return 0, fail(ErrTruncated, c.pos, "string of %d bytes, %d are left in the file", n, c.left())
	}
	return n, nil
}

// text reads a string of at most limit bytes, limit being less than a window.
func (c *cursor) text(limit uint64) (string, error) {
	n, err := c.length()
	if err != nil {
		return "", err
	}
	if n > limit {
		return "", fail(ErrMalformed, c.pos, "name of %d bytes is too long, at most %d are possible", n, limit)
	}
	b, err := c.peek(int(n))
	if err != nil {
		return "", err
	}
	c.pos += int64(n)
	return string(b), nil
}
