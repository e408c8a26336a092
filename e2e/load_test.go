package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func insecure(t *testing.T) http.RoundTripper {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

const loadClients = 64

// Clients stream for a while, one in eight slowly or leaving early; then nothing is left of them in kvshield serve.
// KVSHIELD_LOAD is for how long, and has the time that the proxy adds measured; it is reported and not judged.
func TestLoad(t *testing.T) {
	span := 4 * time.Second
	if d, err := time.ParseDuration(os.Getenv("KVSHIELD_LOAD")); err == nil {
		span = d
	}
	s := startShielded(t, serveOptions{model: demoModel, args: []string{"-np", "8", "-c", "4096"}})
	tr := &http.Transport{MaxIdleConnsPerHost: loadClients}
	s.client.Transport = tr
	s.streamOne(t, 0) // whatever is made at the first request
	tr.CloseIdleConnections()
	before := usageOf(t, s)
	end := time.Now().Add(span)
	var wg sync.WaitGroup
	var answers atomic.Int64
	for i := range loadClients {
		wg.Go(func() {
			for time.Now().Before(end) {
				s.streamOne(t, i)
				answers.Add(1)
			}
		})
	}
	wg.Wait()
	tr.CloseIdleConnections()
	var after usage
	for wait := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		if after = usageOf(t, s); after.descriptors <= before.descriptors && after.goroutines <= before.goroutines || time.Now().After(wait) {
			break
		}
	}
	t.Logf("%d answers; before %+v, after %+v", answers.Load(), before, after)
	if after.descriptors > before.descriptors {
		t.Errorf("%d file descriptors, %d before", after.descriptors, before.descriptors)
	}
	if after.goroutines > before.goroutines {
		t.Errorf("%d goroutines, %d before", after.goroutines, before.goroutines)
	}
	if after.kib > before.kib+32<<10 {
		t.Errorf("%d KiB, %d before", after.kib, before.kib)
	}
	if os.Getenv("KVSHIELD_LOAD") != "" {
		s.reportAdded(t)
	}
}

// streamOne reads one answer; every eighth client reads slowly, every other eighth leaves in the middle.
func (s *server) streamOne(t *testing.T, client int) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	body := fmt.Sprintf(`{"prompt":"The sea %d","n_predict":12,"stream":true,"ignore_eos":true}`, client)
	r, _ := http.NewRequestWithContext(ctx, "POST", s.url+"/completion", strings.NewReader(body))
	resp, err := s.client.Do(r)
	if err != nil {
		t.Error(err)
		return
	}
	defer resp.Body.Close()
	events := 0
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "data: ") {
			events++
		}
		if client%8 == 1 {
			time.Sleep(20 * time.Millisecond)
		}
		if client%8 == 2 && events == 3 {
			return
		}
	}
	if resp.StatusCode != http.StatusOK || events < 12 {
		t.Errorf("status %d, %d events", resp.StatusCode, events)
	}
}

type usage struct{ descriptors, goroutines, threads, kib int }

func usageOf(t *testing.T, s *server) usage {
	t.Helper()
	resp, err := s.client.Get(s.url + "/kvshield/status")
	if err != nil {
		t.Fatal(err)
	}
	var status struct{ Goroutines int }
	err = json.NewDecoder(resp.Body).Decode(&status)
	resp.Body.Close()
	s.client.CloseIdleConnections() // else the question itself is counted
	if err != nil || status.Goroutines == 0 {
		t.Fatalf("%+v %v", status, err)
	}
	proc := fmt.Sprintf("/proc/%d/", s.cmd.Process.Pid)
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	u := usage{descriptors: len(fds), goroutines: status.Goroutines}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, "Threads:"):
			u.threads, _ = strconv.Atoi(f[1])
		case strings.HasPrefix(line, "VmRSS:"):
			u.kib, _ = strconv.Atoi(f[1])
		}
	}
	return u
}

// reportAdded asks the engine and the proxy in turns for something small.
func (s *server) reportAdded(t *testing.T) {
	socket := s.engineSocket(t)
	direct := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	var times [2][]time.Duration
	for range 2000 {
		for i, c := range []*http.Client{direct, s.client} {
			url := []string{"http://engine", s.url}[i]
			began := time.Now()
			resp, err := c.Post(url+"/tokenize", "application/json", strings.NewReader(`{"content":"The sea"}`))
			if err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			times[i] = append(times[i], time.Since(began))
		}
	}
	for i := range times {
		slices.Sort(times[i])
	}
	for _, q := range []int{50, 99} {
		d, p := times[0][len(times[0])*q/100], times[1][len(times[1])*q/100]
		t.Logf("p%d: direct %v, through the proxy %v, added %v", q, d, p, p-d)
	}
}

func (s *server) engineSocket(t *testing.T) string {
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range found {
		text, err := os.ReadFile(f)
		args := strings.Split(string(text), "\x00")
		status, _ := os.ReadFile(filepath.Join(filepath.Dir(f), "status"))
		if at := slices.Index(args, "--host"); err == nil && at >= 0 && strings.HasSuffix(args[at+1], "/engine.sock") &&
			strings.Contains(string(status), fmt.Sprintf("PPid:\t%d\n", s.cmd.Process.Pid)) {
			return args[at+1]
		}
	}
	t.Fatal("the engine's socket was not found")
	return ""
}
