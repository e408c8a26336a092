package page_test

import (
	"context"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/kvshield/kvshield/internal/browser"
	"github.com/kvshield/kvshield/proxy"
	"github.com/kvshield/kvshield/proxy/keys"
	"github.com/kvshield/kvshield/telemetry/page"
)

// server serves the page as kvshield serve does.
type server struct {
	t       *testing.T
	handler http.Handler
	address string
	stop    func()
}

func start(t *testing.T, source func() page.Snapshot, ring *keys.Ring) *server {
	t.Helper()
	s := &server{t: t, handler: proxy.New(proxy.Config{State: func() proxy.State { return proxy.State{Ready: true} }, Keys: ring, Own: page.Handlers(source)})}
	s.start("127.0.0.1:0")
	t.Cleanup(func() { s.stop() })
	return s
}

func (s *server) start(address string) {
	s.t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- proxy.Serve(ctx, l, s.handler, proxy.ServeConfig{Drain: browser.Patience}) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Error(err)
		}
	})
}

func (s *server) url() string { return "http://" + s.address }

func serve(t *testing.T, source func() page.Snapshot, ring *keys.Ring) string {
	t.Helper()
	return start(t, source, ring).url()
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
