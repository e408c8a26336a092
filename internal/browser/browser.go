// Package browser lets tests look at a page in a real Chromium.
//
// Start with [Open]. A page that complains in its console, or asks another host for anything, is known afterwards from
// [Page.Complaints] and [Page.Hosts]. With the folder named by KVSHIELD_SCREENSHOTS, [Page.Shoot] leaves pictures there.
package browser

import (
	"context"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// Patience is how long a test waits for what must happen.
const Patience = time.Minute

// Page is a page in a browser of its own.
type Page struct {
	t   testing.TB
	ctx context.Context

	mu         sync.Mutex
	complaints []string
	hosts      []string
}

// Open shows the page at address. Without a browser on this machine the test is skipped.
func Open(t testing.TB, address string) *Page {
	t.Helper()
	program, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("no chromium on this machine: the page was not looked at")
	}
	flags := append(slices.Clone(chromedp.DefaultExecAllocatorOptions[:]), chromedp.ExecPath(program), chromedp.NoSandbox, chromedp.UserDataDir(t.TempDir()))
	p := &Page{t: t}
	var cancel context.CancelFunc
	p.ctx, cancel = chromedp.NewContext(t.Context(), chromedp.WithAllocatorOptions(flags...), chromedp.WithListener(p.note), chromedp.WithErrorf(t.Logf))
	t.Cleanup(cancel)
	p.check(chromedp.Do(p.ctx)) // starts the browser
	_, err = chromedp.Call(p.ctx, network.Enable, network.EnableParams{})
	p.check(err)
	p.open(address)
	return p
}

// open tries more than once: on a machine that is busy enough, Chromium has given a page up.
func (p *Page) open(address string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, Patience)
	defer cancel()
	err := chromedp.Do(ctx, chromedp.Navigate(address))
	for err != nil && ctx.Err() == nil {
		p.t.Logf("browser: %v; once more", err)
		err = chromedp.Do(ctx, chromedp.Navigate(address))
	}
	p.check(err)
}

func (p *Page) check(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatalf("browser: %v", err)
	}
}

// note keeps what a test may not overlook.
func (p *Page) note(event any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch e := event.(type) {
	case *runtime.EventConsoleAPICalled:
		p.complaints = append(p.complaints, "console: "+string(e.Type))
	case *runtime.EventExceptionThrown:
		p.complaints = append(p.complaints, strings.TrimSpace(e.ExceptionDetails.Text+" "+thrown(e.ExceptionDetails)))
	case *log.EventEntryAdded:
		p.complaints = append(p.complaints, e.Entry.Text)
	case *network.EventRequestWillBeSent:
		if u, err := url.Parse(e.Request.URL); err == nil && !slices.Contains(p.hosts, u.Host) {
			p.hosts = append(p.hosts, u.Host)
		}
	}
}

// Complaints are what the page has said in its console, and what the browser has said about it.
func (p *Page) Complaints() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.complaints)
}

// Hosts are those that anything was asked from.
func (p *Page) Hosts() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.hosts)
}

// Do runs actions.
func (p *Page) Do(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, Patience)
	defer cancel()
	p.check(chromedp.Do(ctx, actions...))
}

// Eval is the value of an expression in the page.
func Eval[T any](p *Page, expression string) T {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, Patience)
	defer cancel()
	v, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		p.t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// Wait waits until an expression is true.
func (p *Page) Wait(expression string) {
	p.t.Helper()
	for end := time.Now().Add(Patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if Eval[bool](p, "!!("+expression+")") {
			return
		}
	}
	p.t.Fatalf("this never became true: %s; the page shows:\n%s", expression, Eval[string](p, "document.body.innerText"))
}

// Text is what an element shows.
func (p *Page) Text(id string) string {
	p.t.Helper()
	return Eval[string](p, "document.getElementById('"+id+"').innerText")
}

// Screen makes the window another size, its height that of the page, in light or dark colours.
func (p *Page) Screen(width int64, dark bool) {
	p.t.Helper()
	scheme := "light"
	if dark {
		scheme = "dark"
	}
	_, err := chromedp.Call(p.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
	p.check(err)
	p.Do(chromedp.EmulateViewport(width, 900))
}

// Shoot leaves a picture of the whole page where KVSHIELD_SCREENSHOTS says.
func (p *Page) Shoot(name string) {
	p.t.Helper()
	dir := os.Getenv("KVSHIELD_SCREENSHOTS")
	if dir == "" {
		return
	}
	picture, err := chromedp.Run(p.ctx, chromedp.FullScreenshot(100))
	p.check(err)
	p.check(os.WriteFile(filepath.Join(dir, name+".png"), picture, 0o644))
}

// Nameless are the roles of those elements that a screen reader comes to and cannot name.
func (p *Page) Nameless() []string {
	p.t.Helper()
	tree, err := chromedp.Call(p.ctx, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{})
	p.check(err)
	var roles []string
	for _, n := range tree.Nodes {
		if n.Ignored || n.Role == nil {
			continue
		}
		role := strings.Trim(string(n.Role.Value), `"`)
		named := n.Name != nil && strings.Trim(string(n.Name.Value), `"`) != ""
		if !named && slices.Contains([]string{"image", "img", "button", "slider", "textbox", "link", "region", "heading", "DisclosureTriangle", "columnheader"}, role) {
			roles = append(roles, role)
		}
	}
	return roles
}

func thrown(e *runtime.ExceptionDetails) string {
	if e.Exception == nil {
		return ""
	}
	return e.Exception.Description
}
