package strict_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvshield/kvshield/proxy/strict"
)

// serve answers with the method, the path and the length of the body.
func serve(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: strict.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		json.NewEncoder(w).Encode([]any{r.Method, r.URL.Path, n})
	})), ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 16 << 10}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(strict.Listener(l, 8<<10)) }()
	t.Cleanup(func() { s.Close(); <-done })
	return l.Addr().String()
}

// talk sends bytes and returns all that came back.
func talk(t testing.TB, addr, sent string) string {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	go io.WriteString(c, sent)
	got, err := io.ReadAll(c)
	if err != nil && !strings.Contains(err.Error(), "reset") {
		t.Fatalf("%v after %q for %.200q", err, got, sent)
	}
	return string(got)
}

const end = "Connection: close\r\n\r\n"

func TestAmbiguousRequestsAreRefused(t *testing.T) {
	addr := serve(t)
	const post = "POST /a HTTP/1.1\r\nHost: x\r\n"
	const chunks = post + "Transfer-Encoding: chunked\r\n\r\n"
	for sent, says := range map[string]string{
		post + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /b HTTP/1.1\r\n": "both",
		post + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n":                    "both",
		post + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello":                                 "length",
		post + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello":                                 "length",
		post + "Content-Length: 5, 5\r\n\r\nhello":                                                   "length",
		post + "Content-Length: +5\r\n\r\nhello":                                                     "length",
		post + "Content-Length: -5\r\n\r\nhello":                                                     "length",
		post + "Content-Length: 0x5\r\n\r\nhello":                                                    "length",
		post + "Content-Length:\r\n\r\nhello":                                                        "length",
		post + "Content-Length: 99999999999999999999\r\n\r\n":                                        "length",
		post + "Content-Length : 5\r\n\r\nhello":                                                     "name",
		post + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n":                                        "name",
		post + ": x\r\n\r\n":                                                                "name",
		post + "no colon\r\n\r\n":                                                           "name",
		post + "X-A: 1\r\n folded\r\n\r\n":                                                  "folded",
		post + "X-A: 1\r\n\tTransfer-Encoding: chunked\r\n\r\n":                             "folded",
		post + "X-A: 1\nX-B: 2\r\n\r\n":                                                     "bare LF",
		"GET /a HTTP/1.1\nHost: x\n\n":                                                      "bare LF",
		post + "X-A: 1\rX-B: 2\r\n\r\n":                                                     "CR",
		post + "X-A: 1\x00\r\n\r\n":                                                         "NUL",
		post + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n":                          "other than chunked",
		post + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n":                       "other than chunked",
		post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n": "other than chunked",
		post + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n":                            "other than chunked",
		post + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n":                               "other than chunked",
		post + "X-Long: " + strings.Repeat("x", 9<<10) + "\r\n\r\n":                         "larger than",
	} {
		got := talk(t, addr, sent)
		status := "HTTP/1.1 400 "
		if says == "larger than" {
			status = "HTTP/1.1 431 "
		}
		if !strings.HasPrefix(got, status) || !strings.Contains(got, says) || !strings.Contains(got, `{"error":{"message":`) {
			t.Errorf("%.120q was answered %q", sent, got)
		}
		if strings.Contains(got, `"/b"`) || strings.Count(got, "HTTP/1.1 ") != 1 {
			t.Errorf("%.120q was answered twice: %q", sent, got)
		}
	}
	for _, sent := range []string{
		chunks + "5\nhello\r\n0\r\n\r\n", chunks + "5\r\nhello\n0\r\n\r\n", chunks + "\r\nhello\r\n0\r\n\r\n", chunks + "5;x=y\r\nhello\r\n0\r\n\r\n",
		chunks + "0x5\r\nhello\r\n0\r\n\r\n", chunks + "-5\r\nhello\r\n0\r\n\r\n", chunks + "+5\r\nhello\r\n0\r\n\r\n", chunks + "fffffffffffffffff\r\n",
		chunks + "5\r\nhelloX0\r\n\r\n", chunks + "0\r\nTransfer-Encoding: x\r\n\r\n", chunks + " 5\r\nhello\r\n0\r\n\r\n",
	} {
		got := talk(t, addr, sent+"GET /b HTTP/1.1\r\nHost: x\r\n"+end)
		if strings.Contains(got, `"/b"`) || strings.Contains(got, "HTTP/1.1 200") {
			t.Errorf("%q was answered %q", sent, got)
		}
	}
}

// Bytes that some servers take for blanks, or drop, around or inside an encoding's name.
func TestOddBytesInAnEncodingAreRefused(t *testing.T) {
	addr := serve(t)
	for _, odd := range []byte{0x01, 0x04, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x1f, ' ', 0x7f, 0xa0, 0xff} {
		for where, value := range map[string]string{"before": string([]byte{odd}) + "chunked", "inside": "chu" + string([]byte{odd}) + "nked", "after": "chunked" + string([]byte{odd})} {
			if (odd == '\t' || odd == ' ') && where != "inside" {
				continue // these are blanks, and may be there
			}
			got := talk(t, addr, "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: "+value+"\r\n\r\n0\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n"+end)
			if !strings.HasPrefix(got, "HTTP/1.1 400 ") || strings.Contains(got, `"/b"`) {
				t.Errorf("%#x %s: %q", odd, where, got)
			}
		}
	}
}

func TestPlainRequestsPass(t *testing.T) {
	addr := serve(t)
	for sent, want := range map[string]string{
		"GET /a HTTP/1.1\r\nHost: x\r\n" + end: `["GET","/a",0]`,
		"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhelloGET /b HTTP/1.1\r\nHost: x\r\n" + end:                                               `["POST","/a",5]["GET","/b",0]`,
		"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nA\r\n0123456789\r\n0\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n" + end: `["POST","/a",15]["GET","/b",0]`,
	} {
		got := strings.Join(bodies(t, talk(t, addr, sent)), "")
		if got != want {
			t.Errorf("%q was answered %s, want %s", sent, got, want)
		}
	}
}

func bodies(t *testing.T, answers string) (list []string) {
	in := bufio.NewReader(strings.NewReader(answers))
	for {
		r, err := http.ReadResponse(in, nil)
		if err != nil {
			return list
		}
		b, _ := io.ReadAll(r.Body)
		list = append(list, strings.TrimSpace(string(b)))
	}
}

// A request that comes byte by byte, and a large one, are what they were.
func TestAnyCutIsTheSame(t *testing.T) {
	addr := serve(t)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	text := "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
	for i := range text {
		io.WriteString(c, text[i:i+1])
	}
	big := bytes.Repeat([]byte("x"), 5<<20)
	go func() {
		io.WriteString(c, "POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 5242880\r\n\r\n")
		c.Write(big)
		io.WriteString(c, "GET /c HTTP/1.1\r\nHost: x\r\n"+end)
	}()
	got, err := io.ReadAll(c)
	if all := strings.Join(bodies(t, string(got)), ""); err != nil || all != `["POST","/a",5]["POST","/b",5242880]["GET","/c",0]` {
		t.Errorf("%s, %v", all, err)
	}
}

// A half-open client is let go when its time for a header is over.
func TestHalfOpenConnectionsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		l := &oneConn{c: far, done: make(chan struct{})}
		s := &http.Server{Handler: http.NotFoundHandler(), ReadHeaderTimeout: 3 * time.Second}
		go s.Serve(strict.Listener(l, 8<<10))
		io.WriteString(near, "GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
		began := time.Now()
		io.Copy(io.Discard, near)
		if d := time.Since(began); d > 10*time.Second {
			t.Errorf("let go after %v", d)
		}
		s.Close()
		near.Close()
	})
}

type oneConn struct {
	c    net.Conn
	done chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	if c := l.c; c != nil {
		l.c = nil
		return c, nil
	}
	<-l.done
	return nil, net.ErrClosed
}
func (l *oneConn) Close() error   { close(l.done); return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{} }

// Whatever comes: no request is seen that a strict reader does not see, and nothing hangs.
func FuzzStream(f *testing.F) {
	f.Add([]byte("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhelloGET /b HTTP/1.1\r\nHost: x\r\n\r\n"))
	f.Add([]byte("POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"))
	f.Add([]byte("GET / HTTP/1.1\nHost: x\n\n"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		near, far := net.Pipe()
		l := strict.Listener(&oneConn{c: far, done: make(chan struct{})}, 1<<10)
		c, _ := l.Accept()
		go func() { near.Write(stream); near.Close() }()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		context.AfterFunc(ctx, func() { far.Close(); near.Close() })
		got, err := io.ReadAll(c)
		if err != nil && ctx.Err() != nil {
			t.Fatal("hangs")
		}
		if !bytes.HasPrefix(stream, got) {
			i := bytes.LastIndex(got, []byte("GET /kvshield/refused/"))
			if i < 0 || !bytes.HasPrefix(stream, got[:i]) {
				t.Errorf("%q became %q", stream, got)
			}
		}
	})
}
