package page_test

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kvshield/kvshield/internal/browser"
	"github.com/kvshield/kvshield/telemetry/page"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// reader reads a stream of events as a program would.
type reader struct {
	*http.Response
	lines *bufio.Reader
	leave func()
}

// look opens the stream. It is a connection of its own, as each browser's is.
func look(t *testing.T, address string) *reader {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), browser.Patience)
	t.Cleanup(cancel)
	r, _ := http.NewRequestWithContext(ctx, "GET", address+"/kvshield/events", nil)
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return &reader{resp, bufio.NewReader(resp.Body), cancel}
}

func (r *reader) next(t *testing.T) map[string]any {
	t.Helper()
	line, err := r.lines.ReadString('\n')
	data, ok := strings.CutPrefix(line, "data: ")
	end, _ := r.lines.ReadString('\n')
	if err != nil || !ok || end != "\n" {
		t.Fatalf("no event: %q %q %v", line, end, err)
	}
	var s map[string]any
	if err := json.Unmarshal([]byte(data), &s); err != nil {
		t.Fatalf("%v in %s", err, data)
	}
	return s
}

func TestEventsCome(t *testing.T) {
	m := &machine{}
	r := look(t, serve(t, m.snapshot, nil))
	for name, want := range map[string]string{"Content-Type": "text/event-stream", "X-Accel-Buffering": "no", "Cache-Control": "no-store, no-transform", "Content-Encoding": ""} {
		if got := r.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	first, second := r.next(t), r.next(t)
	if first["time"] == second["time"] || second["tokens"].(map[string]any)["rate"] == first["tokens"].(map[string]any)["rate"] {
		t.Errorf("the same twice: %v", second["time"])
	}
	if s := second; s["mode"] != "resident" || s["ready"] != true || s["share"].(map[string]any)["p50"].(float64) <= 0 || len(s["layers"].([]any)) != 32 ||
		s["requests"].(map[string]any)["failed"] != 3.0 || s["errors"].([]any)[0].(map[string]any)["kind"] != "unavailable_error" || s["transition_rate"].(float64) <= 0 {
		t.Errorf("%v", s)
	}
}

// However many look, the source is asked once for all.
func TestOneSnapshotIsForAll(t *testing.T) {
	m := &machine{}
	address := serve(t, m.snapshot, nil)
	var readers []*reader
	for range 20 {
		readers = append(readers, look(t, address))
	}
	times := map[any]bool{}
	for range 3 {
		for _, r := range readers {
			times[r.next(t)["time"]] = true
		}
	}
	if asked := int(m.asked.Load()); len(times) > asked || len(times) >= 3*len(readers) {
		t.Errorf("%d readers saw %d snapshots; %d were made", len(readers), len(times), asked)
	}
}

func TestNumbersThatAreNone(t *testing.T) {
	nothing := func() page.Snapshot {
		return page.Snapshot{Tokens: page.Tokens{Rate: math.NaN()}, BytesRate: math.Inf(1), Share: page.Distribution{P50: math.NaN(), Bounds: []float64{1, math.Inf(1)}, Counts: []uint64{1, 2}},
			Layers: []page.Layer{{Wait: math.Inf(-1)}}}
	}
	s := look(t, serve(t, nothing, nil)).next(t)
	share := s["share"].(map[string]any)
	if s["tokens"].(map[string]any)["rate"] != 0.0 || s["bytes_rate"] != 0.0 || share["p50"] != 0.0 || len(share["bounds"].([]any)) != 1 || s["errors"] == nil {
		t.Errorf("%v", s)
	}
}

// Readers that leave make room, and until then the next one is turned away.
func TestOnlySoManyMayLook(t *testing.T) {
	m := &machine{}
	address := serve(t, m.snapshot, nil)
	var readers []*reader
	for range page.MaxStreams {
		r := look(t, address)
		r.next(t)
		readers = append(readers, r)
	}
	if r := look(t, address); r.StatusCode != 503 || r.Header.Get("Retry-After") == "" {
		t.Errorf("one more: %d", r.StatusCode)
	}
	readers[7].leave()
	for end := time.Now().Add(browser.Patience); ; time.Sleep(10 * time.Millisecond) {
		r := look(t, address)
		if r.StatusCode == 200 {
			break
		}
		r.Body.Close()
		if time.Now().After(end) {
			t.Fatal("who left still counts")
		}
	}
}

// A reader that stops reading is let go, when its connection has no more room, and holds up nobody.
func TestSlowReadersAreLetGo(t *testing.T) {
	if testing.Short() {
		t.Skip("waits until the buffers of a connection are full")
	}
	big := strings.Repeat("x", 8<<20)
	address := serve(t, func() page.Snapshot { return page.Snapshot{Time: time.Now(), Statement: big} }, nil)
	c, err := net.Dial("tcp", strings.TrimPrefix(address, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET /kvshield/events HTTP/1.1\r\nHost: x\r\n\r\n")
	other := look(t, address)
	for range 3 {
		other.next(t)
	}
	other.leave()
	time.Sleep(page.WriteWithin)
	c.SetReadDeadline(time.Now().Add(browser.Patience))
	if _, err := io.Copy(io.Discard, c); err != nil && !strings.Contains(err.Error(), "reset") {
		t.Errorf("the connection was not closed: %v", err)
	}
}

func TestOtherSitesMayNotLook(t *testing.T) {
	m := &machine{}
	address := serve(t, m.snapshot, nil)
	for site, want := range map[string]int{"cross-site": 403, "same-site": 403, "same-origin": 200, "none": 200} {
		r, _ := http.NewRequest("HEAD", address+"/kvshield/events", nil)
		r.Header.Set("Sec-Fetch-Site", site)
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d, want %d", site, resp.StatusCode, want)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestFiles(t *testing.T) {
	address := serve(t, (&machine{}).snapshot, nil)
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	t.Cleanup(client.CloseIdleConnections)
	ask := func(method, path, tag string) *http.Response {
		t.Helper()
		r, _ := http.NewRequest(method, address+path, nil)
		if tag != "" {
			r.Header.Set("If-None-Match", tag)
		}
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		return resp
	}
	for path := range page.Handlers(nil) {
		if path == "/kvshield" || path == "/kvshield/events" {
			continue
		}
		r := ask("GET", path, "")
		policy := r.Header.Get("Content-Security-Policy")
		if r.StatusCode != 200 || !strings.Contains(policy, "default-src 'self'") || strings.Contains(policy, "unsafe") || r.Header.Get("X-Content-Type-Options") != "nosniff" || strings.HasPrefix(r.Header.Get("Content-Type"), "text/plain") {
			t.Errorf("%s: %d %v", path, r.StatusCode, r.Header)
		}
		if again := ask("GET", path, r.Header.Get("ETag")); again.StatusCode != 304 {
			t.Errorf("%s again: %d", path, again.StatusCode)
		}
	}
	if r := ask("GET", "/kvshield", ""); r.StatusCode != 308 || r.Header.Get("Location") != "kvshield/" {
		t.Errorf("%d %q", r.StatusCode, r.Header.Get("Location"))
	}
	for path, want := range map[string]int{"/kvshield/assets/": 404, "/kvshield/assets/index.html": 404, "/kvshield/assets/none.js": 404} {
		if r := ask("GET", path, ""); r.StatusCode != want {
			t.Errorf("%s: %d", path, r.StatusCode)
		}
	}
	if r := ask("POST", "/kvshield/events", ""); r.StatusCode != 405 || r.Header.Get("Allow") == "" {
		t.Errorf("POST: %d", r.StatusCode)
	}
}
