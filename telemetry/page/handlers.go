package page

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"fmt"
	"net/http"
	"path"
	"time"

	"github.com/kvshield/kvshield/proxy/reply"
)

//go:embed assets
var assets embed.FS

const (
	root  = "/kvshield/"
	shell = "index.html"
)

// Nothing is loaded from elsewhere, nothing inline runs, no frame shows the page, and no form is ever sent.
const contentSecurity = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"

var types = map[string]string{
	".html": "text/html; charset=utf-8",
	".css":  "text/css; charset=utf-8",
	".js":   "text/javascript; charset=utf-8",
	".svg":  "image/svg+xml",
}

// Handlers returns what to put into proxy.Config.Own, by exact path. Source is called once a second while somebody looks, never by
// two goroutines at a time, and must not block.
func Handlers(source func() Snapshot) map[string]http.Handler {
	handlers := map[string]http.Handler{
		"/kvshield":     readOnly(http.HandlerFunc(addSlash)),
		root + "events": readOnly(newFeed(source)),
	}
	files, err := assets.ReadDir("assets")
	if err != nil {
		panic(err) // it is part of this program
	}
	for _, f := range files {
		name := root + "assets/" + f.Name()
		if f.Name() == shell {
			name = root
		}
		handlers[name] = readOnly(newFile(f.Name()))
	}
	return handlers
}

// addSlash names the page relatively, as there may be another proxy in front that has it under another path.
func addSlash(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Location", "kvshield/")
	w.WriteHeader(http.StatusPermanentRedirect)
}

func readOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			reply.Failure{Message: "this can only be read; use GET", Type: reply.BadRequest, Code: http.StatusMethodNotAllowed}.Write(w)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func newFile(name string) http.Handler {
	content, err := assets.ReadFile("assets/" + name)
	if err != nil {
		panic(err) // it is part of this program
	}
	tag := fmt.Sprintf(`"%.16x"`, sha256.Sum256(content))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Type", types[path.Ext(name)])
		h.Set("Content-Security-Policy", contentSecurity)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-cache") // that is: ask whether it changed
		h.Set("ETag", tag)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	})
}
