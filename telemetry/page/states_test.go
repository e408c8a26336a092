package page_test

import (
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/kvshield/kvshield/internal/browser"
	"github.com/kvshield/kvshield/proxy/keys"
	"github.com/kvshield/kvshield/telemetry/page"
)

const isReady = "document.getElementById('state').innerText === 'ready'"

// One page sees one state after the other.
func TestThePageSaysHowThingsStand(t *testing.T) {
	var state atomic.Pointer[func(*page.Snapshot)]
	m := &machine{spoil: func(s *page.Snapshot) {
		if f := state.Load(); f != nil {
			(*f)(s)
		}
	}}
	p := browser.Open(t, serve(t, m.snapshot, nil)+"/kvshield/")
	p.Wait(isReady)
	for _, c := range []struct {
		name, wait string
		change     func(*page.Snapshot)
	}{
		{"not ready", "document.getElementById('notice').innerText.includes('the enclave died') && document.getElementById('state').innerText === 'not ready'",
			func(s *page.Snapshot) { s.Ready, s.Reason = false, "the enclave died and is started again" }},
		{"off", "document.getElementById('notice').innerText.includes('in clear') && document.getElementById('shield').innerText.includes('keys and values in clear')",
			func(s *page.Snapshot) {
				s.Mode, s.TEE, s.Statement, s.Layers = "off", "", "", nil
				s.Transition, s.Share = page.Distribution{}, page.Distribution{}
			}},
		{"idle", "document.getElementById('notice').hidden && document.getElementById('share50').innerText === '–' && document.getElementById('errors-none').innerText === 'none'",
			func(s *page.Snapshot) {
				*s = page.Snapshot{Time: s.Time, Mode: "resident", TEE: "software", Ready: true, Model: "demo.gguf"}
			}},
		{"odd", "document.getElementById('model').innerText.includes('<img') && !document.querySelector('main img') && document.getElementById('rate').innerText.startsWith('1,234,567')",
			func(s *page.Snapshot) {
				const hostile = "<img src=x onerror=alert(1)>\u202e"
				s.Model, s.Statement, s.Tokens.Rate = hostile, hostile+strings.Repeat("w", 300), 1234567
				s.Layers = append(s.Layers, s.Layers...)
				s.Layers = append(s.Layers, s.Layers...)
				s.Transition = page.Distribution{P50: 3, P99: 40, Bounds: []float64{10}, Counts: []uint64{5, 1}}
				s.Errors = []page.Error{{Time: s.Time, Kind: hostile, Message: hostile + strings.Repeat("w", 300)}}
			}},
	} {
		state.Store(&c.change)
		p.Wait(c.wait)
		for _, width := range []int64{1280, 360} {
			p.Screen(width, false)
			if wide := browser.Eval[int64](p, "document.documentElement.scrollWidth"); wide > width {
				t.Errorf("%s: %d pixels wide on %d", c.name, wide, width)
			}
			p.Shoot("state-" + strings.ReplaceAll(c.name, " ", "-") + map[bool]string{true: "-phone"}[width == 360])
		}
	}
	if got := p.Complaints(); len(got) > 0 {
		t.Errorf("the page complains: %q", got)
	}
}

func TestThePageAsksForAKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(path, []byte("ops:sk-secret-1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ring, _, err := keys.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{}
	p := browser.Open(t, serve(t, m.snapshot, ring)+"/kvshield/")
	p.Wait("document.activeElement.id === 'secret'")
	if m.asked.Load() > 0 {
		t.Error("figures were made for somebody without a key")
	}
	if got := p.Text("figures"); strings.Contains(got, "demo") {
		t.Errorf("shown without a key: %s", got)
	}
	p.Shoot("key")
	p.Do(chromedp.KeyEvent("sk-wrong" + kb.Enter))
	p.Wait("document.getElementById('refused').innerText !== ''")
	p.Do(chromedp.KeyEvent("sk-secret-1" + kb.Enter))
	p.Wait(isReady)
	if got := browser.Eval[string](p, "location.href + document.cookie + JSON.stringify(localStorage) + JSON.stringify(sessionStorage) + document.getElementById('secret').value"); strings.Contains(got, "sk-") {
		t.Errorf("the key is kept in %s", got)
	}
	for _, c := range p.Complaints() {
		if !strings.Contains(c, "401") { // the browser's own words for the first two answers
			t.Errorf("the page complains: %s", c)
		}
	}
	p.Do(chromedp.Reload())
	p.Wait("document.activeElement.id === 'secret'")
}

// The whole page works without a pointer.
func TestThePageByKeyboard(t *testing.T) {
	p := browser.Open(t, serve(t, (&machine{}).snapshot, nil)+"/kvshield/")
	p.Wait(isReady)
	var order []string
	for range 12 {
		p.Do(chromedp.KeyEvent(kb.Tab))
		order = append(order, browser.Eval[string](p, "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"))
	}
	for _, want := range []string{"skip", "pause", "SUMMARY", "layers"} {
		if !strings.Contains(strings.Join(order, " "), want) {
			t.Errorf("Tab never comes to %s: %q", want, order)
		}
	}
	focus := func(selector string) { browser.Eval[bool](p, "document.querySelector('"+selector+"').focus() ?? true") }
	focus("#layers")
	p.Do(chromedp.KeyEvent(kb.ArrowRight + kb.ArrowRight + kb.ArrowRight))
	p.Wait("document.getElementById('layer').innerText.startsWith('Layer 2:')")
	p.Do(chromedp.KeyEvent(kb.End))
	p.Wait("document.getElementById('layers').getAttribute('aria-valuenow') === '31' && document.querySelector('.chosen')")
	for _, id := range []string{"tokens", "share", "transition", "layers"} {
		focus("details:has(#" + id + "-table) summary")
		p.Do(chromedp.KeyEvent(kb.Enter))
		p.Wait("document.querySelectorAll('#" + id + "-table tbody tr').length > 1")
	}
	p.Shoot("tables")
	focus("#pause")
	p.Do(chromedp.KeyEvent(" "))
	still := p.Text("clock")
	browser.Eval[float64](p, "window.since = performance.now()")
	p.Wait("performance.now() > window.since + 2500")
	if now := p.Text("clock"); now != still {
		t.Errorf("paused at %s, and shows %s", still, now)
	}
	p.Do(chromedp.KeyEvent(" "))
	p.Wait("document.getElementById('clock').innerText !== '" + still + "'")
	if got := p.Complaints(); len(got) > 0 {
		t.Errorf("the page complains: %q", got)
	}
}

// A server that goes away and comes back finds its page waiting.
func TestThePageComesBack(t *testing.T) {
	m := &machine{}
	s := start(t, m.snapshot, nil)
	p := browser.Open(t, s.url()+"/kvshield/")
	p.Wait(isReady)
	s.stop()
	p.Wait("document.getElementById('state').innerText.startsWith('no connection') && document.getElementById('figures').classList.contains('stale')")
	p.Shoot("lost")
	s.start(s.address)
	p.Wait(isReady + " && !document.getElementById('figures').classList.contains('stale')")
}
