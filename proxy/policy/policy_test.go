package policy

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

func request(method, target string) *http.Request {
	r := httptest.NewRequest(method, "/", nil)
	u, err := url.ParseRequestURI(target)
	if err != nil {
		panic(err)
	}
	r.URL = u
	return r
}

func TestWhatDefeatsTheShieldIsRefused(t *testing.T) {
	for target, name := range map[string]string{
		"POST /slots/0?action=save":                 "slot-save",
		"POST /slots/0?action=restore":              "slot-restore",
		"POST /slots/0?action=erase":                "slot-erase",
		"POST //slots//0?action=save":               "slot-save",
		"POST /slots/0/?action=save":                "slot-save",
		"POST /%73lots/0?action=save":               "slot-save",
		"POST /%2573lots/0?action=save":             "slot-save",
		"POST /slots%2f0?action=save":               "slot-save",
		"POST /SLOTS/0?action=save":                 "slot-save",
		"POST /slots/0;x?action=save":               "slot-save",
		"POST /a/../slots/0?action=save":            "slot-save",
		"POST /a/%2e%2e/slots/0?action=save":        "slot-save",
		"POST /prefix/slots/0?action=save":          "slot-save",
		`POST /\slots/0?action=save`:                "slot-save",
		"POST /slots/0?%61ction=save":               "slot-save",
		"PUT /slots/0?action=save":                  "slot-save",
		"post /slots/0?action=save":                 "slot-save",
		"POST /slots/0?action=erase&action=save":    "slots",
		"POST /slots/0?Action=save":                 "slots",
		"POST /slots/0?action=SAVE":                 "slots",
		"POST /slots/0?action=save;x":               "slots",
		"POST /slots/0":                             "slots",
		"POST /health%23/slots/0":                   "slots",
		"POST /lora-adapters":                       "lora",
		"POST /lora-adapters/":                      "lora",
		"POST /props":                               "props",
		"POST /./props":                             "props",
		"POST /props%00":                            "props",
		"POST /tools":                               "tools",
		"POST /api/experimental/web_search":         "cloud",
		"POST /api/experimental//Web_Fetch/":        "cloud",
		"GET /cors-proxy?url=http://10.0.0.1/":      "cors-proxy",
		"POST http://other/slots/0?action=save":     "slot-save",
		"POST /slots/0?action=save&filename=%2fetc": "slot-save",
	} {
		method, uri, _ := strings.Cut(target, " ")
		f := Policy{}.Check(request(method, uri))
		if f == nil {
			t.Errorf("%s was let through", target)
			continue
		}
		if f.Code != http.StatusForbidden || !strings.HasSuffix(f.Message, "--allow "+name) {
			t.Errorf("%s: %+v, want it to name %s", target, *f, name)
		}
		p, err := New([]string{name})
		if err != nil {
			t.Fatal(err)
		}
		if f := p.Check(request(method, uri)); f != nil {
			t.Errorf("%s with %s allowed: %v", target, name, f)
		}
	}
}

func TestTheRestPasses(t *testing.T) {
	for _, target := range []string{
		"POST /completion", "POST /v1/chat/completions", "GET /slots", "GET /props", "GET /lora-adapters", "POST /api/chat", "POST /api/pull", "POST /api/push", "POST /api/blobs/sha256:0", "DELETE /api/delete",
		"POST /api/create", "POST /tokenize", "OPTIONS /slots/0?action=save", "GET /?x=/slots/0", "GET /tools", "POST /v1/messages?beta=true",
	} {
		method, uri, _ := strings.Cut(target, " ")
		if f := (Policy{}).Check(request(method, uri)); f != nil {
			t.Errorf("%s: %v", target, f)
		}
	}
}

func TestAnActionInAFormIsNotTheAllowedOne(t *testing.T) {
	p, _ := New([]string{"slot-erase"})
	r := request("POST", "/slots/0?action=erase")
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if p.Check(r) == nil {
		t.Error("a body that could carry another action was let through")
	}
}

func TestMethodOverrideIsRefused(t *testing.T) {
	r := request("GET", "/props")
	r.Header.Set("X-HTTP-Method-Override", "POST")
	if f := (Policy{}).Check(r); f == nil || f.Code != http.StatusBadRequest {
		t.Errorf("got %v", f)
	}
}

func TestUnknownNamesAreRefused(t *testing.T) {
	if _, err := New([]string{"everything"}); err == nil || !strings.Contains(err.Error(), "slot-save") {
		t.Errorf("got %v", err)
	}
}

// Another encoding of a refused path is refused.
func FuzzEncodingsOfAPath(f *testing.F) {
	f.Add([]byte{0, 1, 2}, false)
	f.Fuzz(func(t *testing.T, encode []byte, double bool) {
		const hex = "0123456789abcdef"
		out := []byte("/")
		for i, c := range []byte("slots/0") {
			if i < len(encode) && encode[i]&1 == 1 {
				out = append(out, '%')
				if double {
					out = append(out, "25"...)
				}
				out = append(out, hex[c>>4], hex[c&15])
				continue
			}
			if i < len(encode) && encode[i]&2 == 2 && c == '/' {
				out = append(out, '/')
			}
			out = append(out, c)
		}
		if (Policy{}).Check(request("POST", string(out)+"?action=save")) == nil {
			t.Errorf("%s was let through", out)
		}
	})
}
