package proxy_test

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/proxy"
	"github.com/kvshield/kvshield/proxy/limit"
)

// A client that takes nothing of its answer gives its turn back when the time of its request is over.
func TestAReaderThatStandsStillIsLetGo(t *testing.T) {
	began := make(chan struct{}, 2)
	l := httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		began <- struct{}{}
		if r.URL.Path != "/long" {
			return
		}
		for part := bytes.Repeat([]byte("data: x\n\n"), 10_000); ; {
			if _, err := w.Write(part); err != nil {
				return
			}
		}
	})
	s, _ := frontWith(t, proxy.Config{Dial: dialer(l), State: ready, RequestTimeout: 300 * time.Millisecond, Limit: limit.New(1, 1, 0)})
	c, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "POST /long HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
	<-began
	client := s.Client()
	client.Timeout = patience
	r, err := client.Post(s.URL+"/short", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatalf("the next request did not get its turn: %v", err)
	}
	r.Body.Close()
}
