package page_test

import (
	"net"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/internal/browser"
	"github.com/kvshield/kvshield/proxy"
	"github.com/kvshield/kvshield/proxy/keys"
	"github.com/kvshield/kvshield/telemetry/page"
)

// serve serves the page as kvshield serve does, and returns its address.
func serve(t *testing.T, source func() page.Snapshot, ring *keys.Ring) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := proxy.New(proxy.Config{State: func() proxy.State { return proxy.State{Ready: true} }, Keys: ring, Own: page.Handlers(source)})
	done := make(chan error, 1)
	go func() { done <- proxy.Serve(t.Context(), l, h, proxy.ServeConfig{Drain: browser.Patience}) }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + l.Addr().String()
}

var screens = []struct {
	name  string
	width int64
	dark  bool
}{{"light", 1280, false}, {"dark", 1280, true}, {"tablet", 800, false}, {"phone", 360, false}, {"phone-dark", 360, true}}

func TestThePageLives(t *testing.T) {
	m := &machine{}
	address := serve(t, m.snapshot, nil)
	p := browser.Open(t, address+"/kvshield")
	p.Wait("document.getElementById('state').innerText === 'ready'")
	first := p.Text("rate")
	p.Wait("document.getElementById('rate').innerText !== '" + first + "' && document.querySelector('#tokens .curve').getAttribute('d').split('L').length > 3")
	for _, screen := range screens {
		p.Screen(screen.width, screen.dark)
		if wide := browser.Eval[int64](p, "document.documentElement.scrollWidth"); wide > screen.width {
			t.Errorf("%s: the page is %d pixels wide", screen.name, wide)
		}
		p.Shoot("page-" + screen.name)
	}
	if bad := p.Nameless(); len(bad) > 0 {
		t.Errorf("without a name for a screen reader: %q", bad)
	}
	if got := p.Complaints(); len(got) > 0 {
		t.Errorf("the page complains: %q", got)
	}
	if got := p.Hosts(); len(got) != 1 || got[0] != strings.TrimPrefix(address, "http://") {
		t.Errorf("the page asked %q", got)
	}
}
