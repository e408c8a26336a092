// Package strict lets only unambiguous HTTP/1.1 request heads through to net/http.
//
// net/http accepts what other programs read differently: a length beside chunks, lines that end in a bare LF, folded headers. Whoever passes such
// requests on can be made to see a request where the next one sees part of a body. [Listener] reads each head before
// net/http does; in place of one that is ambiguous it hands on a request for a path that [Handler] knows, and nothing after it.
package strict

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/kvshield/kvshield/proxy/reply"
)

const refusedPath = "/kvshield/refused/"

// faults and what is said of them.
var faults = map[string]reply.Failure{
	"bare-lf":   bad("a line of the request's header ends in a bare LF; end lines in CR LF"),
	"bare-cr":   bad("the request's header has a CR or a NUL inside a line; take it out"),
	"folded":    bad("the request has a header folded over lines; write it on one line"),
	"name":      bad("a header of the request has no proper name; a name is letters, digits and hyphens right before the colon"),
	"lengths":   bad("the request gives its length more than once, or not as a plain number; give one Content-Length"),
	"both":      bad("the request has both Content-Length and Transfer-Encoding; send one"),
	"encoding":  bad("the request has a Transfer-Encoding other than chunked; send chunked or a Content-Length"),
	"chunk":     bad("the request's chunks are malformed; a chunk is its size in hexadecimal, CR LF, so many bytes, CR LF"),
	"too-large": {Message: "the request's header is larger than this server takes; send less, or have --max-header raised", Type: reply.BadRequest, Code: http.StatusRequestHeaderFieldsTooLarge},
}

func bad(message string) reply.Failure {
	return reply.Failure{Message: message, Type: reply.BadRequest, Code: http.StatusBadRequest}
}

// Handler answers what a Listener refused, and passes on the rest.
func Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := strings.CutPrefix(r.URL.Path, refusedPath)
		f, known := faults[name]
		if !ok || !known {
			next.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Connection", "close")
		f.Write(w)
	})
}

// Listener makes connections strict. A head may have maxHead bytes.
func Listener(l net.Listener, maxHead int) net.Listener { return &listener{l, maxHead} }

type listener struct {
	net.Listener
	maxHead int
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &conn{Conn: c, maxHead: l.maxHead}, nil
}

// conn reads a head whole, checks it, and then follows the body to where the next head begins.
type conn struct {
	net.Conn
	maxHead int
	in      []byte // read and not yet passed
	pass    int    // bytes of in that may be passed
	body    body   // what of the current request is still to come
	refused bool
	err     error
}

func (c *conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if c.pass > 0 {
			n := copy(p, c.in[:c.pass])
			c.in, c.pass = c.in[n:], c.pass-n
			return n, nil
		}
		if c.refused {
			return 0, io.EOF
		}
		if c.advance() {
			continue
		}
		if c.err != nil {
			return c.last(p)
		}
		c.fill()
	}
}

// last passes on what is left when the client has hung up: a head that is cut is net/http's to refuse.
func (c *conn) last(p []byte) (int, error) {
	if len(c.in) == 0 || !errors.Is(c.err, io.EOF) {
		err := c.err
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			c.err = nil // a deadline that passed can be set again
		}
		return 0, err
	}
	n := copy(p, c.in)
	c.in = c.in[n:]
	return n, nil
}

func (c *conn) fill() {
	buf := make([]byte, 4096)
	n, err := c.Conn.Read(buf)
	c.in, c.err = append(c.in, buf[:n]...), err
}

// advance finds out how much of in may be passed. It is false when more has to be read first.
func (c *conn) advance() bool {
	if len(c.in) == 0 {
		return false
	}
	if !c.body.over() {
		n, ok := c.body.take(c.in)
		if !ok {
			return c.refuse("chunk")
		}
		c.pass = n
		return n > 0
	}
	if len(bytes.TrimLeft(c.in[:min(len(c.in), 4)], "\r\n")) == 0 && len(c.in) <= 4 {
		return false // empty lines before a request; net/http refuses more of them
	}
	end := bytes.Index(c.in, []byte("\r\n\r\n"))
	scan := c.in
	if end >= 0 {
		scan = c.in[:end+2]
	}
	if i := bytes.IndexByte(scan, '\n'); i == 0 || i > 0 && bareLF(scan) {
		return c.refuse("bare-lf")
	}
	if end > c.maxHead || end < 0 && len(c.in) > c.maxHead {
		return c.refuse("too-large")
	}
	if end < 0 {
		return false
	}
	next, fault := check(scan)
	if fault != "" {
		return c.refuse(fault)
	}
	c.body, c.pass = next, end+4
	return true
}

func (c *conn) refuse(name string) bool {
	c.in = []byte("GET " + refusedPath + name + " HTTP/1.1\r\nHost: refused\r\nConnection: close\r\n\r\n")
	c.pass, c.refused = len(c.in), true
	return true
}

func bareLF(head []byte) bool {
	for i, b := range head {
		if b == '\n' && (i == 0 || head[i-1] != '\r') {
			return true
		}
	}
	return false
}

// check reads a head whose lines all end in CR LF, and returns its body or what is wrong with it.
func check(head []byte) (body, string) {
	lines := strings.Split(strings.TrimSuffix(strings.TrimLeft(string(head), "\r\n"), "\r\n"), "\r\n")
	length, chunked := "", false
	for i, line := range lines {
		if strings.ContainsAny(line, "\r\x00") {
			return body{}, "bare-cr"
		}
		if i == 0 {
			continue // net/http is strict about the request line
		}
		if line != "" && (line[0] == ' ' || line[0] == '\t') {
			return body{}, "folded"
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok || !isToken(name) {
			return body{}, "name"
		}
		value = strings.Trim(value, " \t")
		switch strings.ToLower(name) {
		case "content-length":
			if length != "" || !isNumber(value) {
				return body{}, "lengths"
			}
			length = value
		case "transfer-encoding":
			if chunked || !strings.EqualFold(value, "chunked") {
				return body{}, "encoding"
			}
			chunked = true
		}
	}
	if chunked && length != "" {
		return body{}, "both"
	}
	if chunked {
		return body{chunked: true, state: sizeLine}, ""
	}
	n, _ := strconv.ParseInt(length, 10, 64)
	return body{left: n}, ""
}

func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0) {
			return false
		}
	}
	return s != ""
}

func isNumber(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != "" && len(s) <= 18
}
