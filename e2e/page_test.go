package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/kvshield/kvshield/internal/browser"
)

// busy has requests answered, two at a time, until the test ends.
func (s *server) busy(t *testing.T) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	for i := range 2 {
		go func() {
			for n := 0; ctx.Err() == nil; n++ {
				body := fmt.Sprintf(`{"messages":[{"role":"user","content":%q}],"max_tokens":120,"stream":%t,"ignore_eos":true}`, prompts[(i+n)%len(prompts)], i == 0)
				r, _ := http.NewRequestWithContext(ctx, "POST", s.url+"/v1/chat/completions", strings.NewReader(body))
				if resp, err := s.client.Do(r); err == nil {
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			}
			done <- struct{}{}
		}()
	}
	stop = func() { cancel(); <-done; <-done }
	return stop
}

// The page of a real run, in a real browser, while requests are answered.
func TestThePageOfARealRun(t *testing.T) {
	s := startShielded(t, serveOptions{model: demoModel, args: []string{"-np", "2"}})
	p := browser.Open(t, s.url+"/kvshield/")
	p.Wait("document.getElementById('state').innerText === 'ready'")
	if got := p.Text("rate"); !strings.HasPrefix(got, "0") {
		t.Errorf("%s tokens before anything was asked", got)
	}
	stop := s.busy(t)
	const number = "(id) => parseFloat(document.getElementById(id).innerText.replaceAll(',', ''))"
	for _, id := range []string{"rate", "active", "share50", "share99", "transition50", "transition99", "transitions", "bytes"} {
		p.Wait("(" + number + ")('" + id + "') > 0")
	}
	const layers = 5 // of the demo model
	p.Wait(fmt.Sprintf("document.querySelectorAll('#layers .cell').length >= %d && document.getElementById('layers').getAttribute('aria-valuemax') === '%d'", 2*layers, layers-1))
	for _, id := range []string{"share", "transition"} {
		p.Wait("document.querySelectorAll('#" + id + " .bar').length > 0")
	}
	decoded := "[...document.querySelectorAll('#shield dt')].find((e) => e.innerText === 'Decoded').nextElementSibling.innerText"
	first, clock := browser.Eval[string](p, decoded), p.Text("clock")
	p.Wait(fmt.Sprintf("%s !== %q && document.getElementById('clock').innerText !== %q", decoded, first, clock))
	p.Wait("document.querySelector('#tokens .curve').getAttribute('d').split('L').length > 5")
	for name, width := range map[string]int64{"run": 1280, "run-phone": 360} {
		p.Screen(width, false)
		p.Shoot(name)
	}
	stop()
	p.Wait("(" + number + ")('active') === 0 && (" + number + ")('rate') === 0")
	s.agreesWithStatus(t, p.Text("shield"))
	if got := p.Complaints(); len(got) > 0 {
		t.Errorf("the page complains: %q", got)
	}
	if got := p.Hosts(); len(got) != 1 || "http://"+got[0] != s.url {
		t.Errorf("the page asked %q", got)
	}
}

// agreesWithStatus compares what is said about the shield with /kvshield/status.
func (s *server) agreesWithStatus(t *testing.T, shown string) {
	t.Helper()
	resp, err := s.client.Get(s.url + "/kvshield/status")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var status struct {
		Mode    string
		Enclave struct{ Backend, Statement string }
	}
	if err := json.NewDecoder(resp.Body).Decode(&status); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{status.Mode, status.Enclave.Backend, status.Enclave.Statement, "no hardware protection", "zeros"} {
		if want == "" || !strings.Contains(shown, want) {
			t.Errorf("the page does not say %q: %s", want, shown)
		}
	}
}

// A page that somebody left open does not hold up the end.
func TestAnOpenPageDoesNotHoldUpTheEnd(t *testing.T) {
	s := startShielded(t, serveOptions{model: demoModel, flags: []string{"--drain", "40s"}})
	resp, err := s.client.Get(s.url + "/kvshield/events")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := resp.Body.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	if err := s.wait(t); err != nil {
		t.Errorf("kvshield serve: %v\n%s", err, s.log)
	}
}
