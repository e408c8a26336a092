package proxy_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/proxy"
)

// serve runs Serve and returns what stops it and what it returned.
func serve(t *testing.T, h http.Handler, drain time.Duration) (addr string, stop func(), result <-chan error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	done := make(chan error, 1)
	go func() { done <- proxy.Serve(ctx, l, h, proxy.ServeConfig{Drain: drain}) }()
	return l.Addr().String(), cancel, done
}

func outcome(t *testing.T, result <-chan error) error {
	t.Helper()
	select {
	case err := <-result:
		return err
	case <-time.After(patience):
		t.Fatal("Serve did not return")
		return nil
	}
}

type reply struct {
	body string
	err  error
}

// ask sends one request on a connection of its own.
func ask(addr string) <-chan reply {
	c := make(chan reply, 1)
	go func() {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		r, err := client.Get("http://" + addr)
		if err != nil {
			c <- reply{"", err}
			return
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		c <- reply{string(b), err}
	}()
	return c
}

func TestServeLetsAnswersFinish(t *testing.T) {
	arrived, finish := make(chan struct{}), make(chan struct{})
	addr, stop, result := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(arrived)
		select {
		case <-finish:
		case <-r.Context().Done():
			t.Error("a request was cancelled while draining")
		}
		io.WriteString(w, "whole")
	}), patience)
	got := ask(addr)
	wait(t, arrived, "the request arrives")
	stop()
	for { // the listener closes before the running answer is done
		c, err := net.Dial("tcp", addr)
		if err != nil {
			break
		}
		c.Close()
	}
	close(finish)
	if r := <-got; r.body != "whole" || r.err != nil {
		t.Errorf("the client got %q, %v", r.body, r.err)
	}
	if err := outcome(t, result); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

func TestServeCutsWhatDoesNotFinish(t *testing.T) {
	arrived, cancelled := make(chan struct{}), make(chan struct{})
	addr, stop, result := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "half")
		http.NewResponseController(w).Flush()
		close(arrived)
		<-r.Context().Done()
		close(cancelled)
		panic(http.ErrAbortHandler)
	}), 10*time.Millisecond)
	got := ask(addr)
	wait(t, arrived, "the request arrives")
	stop()
	if err := outcome(t, result); !errors.Is(err, proxy.ErrDrain) {
		t.Errorf("Serve: %v, want ErrDrain", err)
	}
	wait(t, cancelled, "the request is cancelled")
	if r := <-got; r.err == nil {
		t.Errorf("the client got %q as a whole answer", r.body)
	}
}

// A stream of our own has no end but this one.
func TestServeEndsOwnStreams(t *testing.T) {
	arrived := make(chan struct{})
	h := proxy.New(proxy.Config{State: ready, Own: own(func(w http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
		io.WriteString(w, "the end")
	}, "/kvshield/events")})
	addr, stop, result := serve(t, h, 10*patience)
	got := ask(addr + "/kvshield/events")
	wait(t, arrived, "the request arrives")
	stop()
	if err := outcome(t, result); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if r := <-got; r.body != "the end" || r.err != nil {
		t.Errorf("the client got %q, %v", r.body, r.err)
	}
}

// A connection without a request must not make a clean end look like a cut.
func TestServeIgnoresSilentConnections(t *testing.T) {
	addr, stop, result := serve(t, http.NotFoundHandler(), 10*time.Millisecond)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if r := <-ask(addr); r.err != nil {
		t.Fatal(r.err)
	}
	stop()
	if err := outcome(t, result); err != nil {
		t.Errorf("Serve: %v", err)
	}
	c.SetReadDeadline(time.Now().Add(patience / 4)) // well before the server would give up on it
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the silent connection is still open: %v", err)
	}
}

func TestServeReportsABrokenListener(t *testing.T) {
	l := listen(t)
	l.Close()
	if err := proxy.Serve(t.Context(), l, http.NotFoundHandler(), proxy.ServeConfig{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v, want net.ErrClosed", err)
	}
}

func TestServeRefusesEndlessHeaders(t *testing.T) {
	addr, stop, result := serve(t, http.NotFoundHandler(), patience)
	req, _ := http.NewRequest("GET", "http://"+addr, nil)
	req.Header.Set("X-Long", strings.Repeat("x", 1<<20))
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	if r, err := client.Do(req); err == nil {
		r.Body.Close()
		if r.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("status %d", r.StatusCode)
		}
	}
	stop()
	if err := outcome(t, result); err != nil {
		t.Errorf("Serve: %v", err)
	}
}
