package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/kvshield/kvshield/proxy/keys"
	"github.com/kvshield/kvshield/proxy/limit"
	"github.com/kvshield/kvshield/proxy/reply"
)

// Own paths are below this one, and none of them reaches the engine.
const ownPaths = "/kvshield/"

var tooLarge = reply.Failure{
	Message: "the request body is larger than this server takes; send less, or have --max-body raised",
	Type:    reply.BadRequest,
	Code:    http.StatusRequestEntityTooLarge,
}

// sound refuses what is not a plain HTTP request.
func sound(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodConnect || isWebSocket(r.Header) {
			reply.Failure{Message: "upgrades and tunnels are refused: this server speaks HTTP/1.1 only; stream with server-sent events instead", Type: reply.BadRequest, Code: http.StatusNotImplemented}.Write(w)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func isWebSocket(h http.Header) bool {
	return slices.ContainsFunc(h.Values("Upgrade"), func(v string) bool { return strings.Contains(strings.ToLower(v), "websocket") })
}

func (c Config) sized(next http.Handler) http.Handler {
	if c.MaxBody <= 0 {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c.Ollama && isFile(r) {
			next.ServeHTTP(w, r)
			return
		}
		if r.ContentLength > c.MaxBody {
			w.Header().Set("Connection", "close") // the rest is not read
			tooLarge.Write(w)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, c.MaxBody)
		next.ServeHTTP(w, r)
	})
}

type tenantKey struct{}

func tenantOf(ctx context.Context) string { t, _ := ctx.Value(tenantKey{}).(string); return t }

// admitted lets in who has a key. What llama-server shows without a key stays open: its health, and the files of its page; so do
// those of kvshield's page, which are the same for everybody.
func (c Config) admitted(next http.Handler) http.Handler {
	if c.Keys == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tenant, ok := c.Keys.Tenant(r)
		if !ok && !isOpen(r) && !c.isOwnPage(r) {
			w.Header().Set("WWW-Authenticate", "Bearer")
			reply.Failure{Message: "invalid or missing API key; send it as Authorization: Bearer KEY or as X-Api-Key: KEY", Type: reply.Authentication, Code: http.StatusUnauthorized}.Write(w)
			return
		}
		r = r.WithContext(context.WithValue(r.Context(), tenantKey{}, tenant))
		keys.Strip(r.Header)
		next.ServeHTTP(w, r)
	})
}

// isOpen goes by the exact path, so that no other spelling of a path is open.
func isOpen(r *http.Request) bool {
	if r.URL.RawPath != "" || strings.Contains(r.URL.Path, "//") || strings.Contains(r.URL.Path, "..") {
		return false
	}
	switch r.Method {
	case http.MethodOptions:
		return r.Header.Get("Origin") != "" && r.Header.Get("Access-Control-Request-Method") != ""
	case http.MethodGet, http.MethodHead:
		return r.URL.Path == "/health" || r.URL.Path == "/v1/health" || isPage(r.URL.Path)
	}
	return false
}

// isPage is true for files of llama-server's page.
func isPage(path string) bool {
	if strings.HasPrefix(path, ollamaPaths) || strings.HasPrefix(path, "/v1/") {
		return false // models may have such names
	}
	if path == "/" || path == "/build.json" || path == "/_app/version.json" {
		return true
	}
	for _, suffix := range []string{".html", ".js", ".css", ".ico", ".svg", ".png", ".webmanifest", ".woff2"} {
		if strings.HasSuffix(path, suffix) && !strings.HasPrefix(path, ownPaths) {
			return true
		}
	}
	return false
}

// isOwnPage is true for files of the page at /kvshield/. What that page shows comes from another path.
func (c Config) isOwnPage(r *http.Request) bool {
	path := r.URL.Path
	reads := r.Method == http.MethodGet || r.Method == http.MethodHead
	return reads && c.Own[path] != nil && (path+"/" == ownPaths || path == ownPaths || strings.HasPrefix(path, ownPaths+"assets/"))
}

type drainKey struct{}

// untilDrain ends a request of our own when the server begins to drain: a stream of events would go on for ever.
func untilDrain(r *http.Request) (*http.Request, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	if drain, ok := ctx.Value(drainKey{}).(context.Context); ok {
		context.AfterFunc(drain, cancel)
	}
	return r.WithContext(ctx), cancel
}

// own answers below /kvshield/.
func (c Config) own(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case c.Own[r.URL.Path] != nil:
			r, end := untilDrain(r)
			defer end()
			c.Own[r.URL.Path].ServeHTTP(w, r)
		case c.Status != nil && r.URL.Path == ownPaths+"status":
			if r.Method != http.MethodGet && r.Method != http.MethodHead {
				reply.Failure{Message: "the status can only be read; use GET", Type: reply.BadRequest, Code: http.StatusMethodNotAllowed}.Write(w)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Cache-Control", "no-store")
			e := json.NewEncoder(w)
			e.SetIndent("", "  ")
			e.Encode(c.Status())
		case strings.HasPrefix(r.URL.Path, ownPaths):
			reply.Failure{Message: "there is nothing here; see /kvshield/status", Type: "not_found_error", Code: http.StatusNotFound}.Write(w)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

func (c Config) checked(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f := c.Policy.Check(r); f != nil {
			f.Write(w)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// limited has requests wait for their turn. Reading ones, health among them, are not work for the engine.
func (c Config) limited(next http.Handler) http.Handler {
	if c.Limit == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodOptions {
			next.ServeHTTP(w, r)
			return
		}
		leave, err := c.Limit.Enter(r.Context(), func() { observe(r.Context(), Event{Kind: Queued}) })
		switch {
		case errors.Is(err, limit.ErrFull):
			reply.Failure{Message: "too many requests are waiting already; send the request again in a moment", Type: reply.RateLimit, Code: http.StatusTooManyRequests}.WriteRetry(w, queueRetry)
		case errors.Is(err, limit.ErrLate):
			reply.Failure{Message: "the request waited for its turn longer than this server lets one; send it again in a moment", Type: reply.Unavailable, Code: http.StatusServiceUnavailable}.WriteRetry(w, queueRetry)
		case err != nil:
			panic(http.ErrAbortHandler) // the client has left
		default:
			defer leave()
			next.ServeHTTP(w, r)
		}
	})
}

const (
	queueRetry = 2 * time.Second
	// lastWords is how long a client may take for the end of an answer that was cut.
	lastWords = time.Second
)

func (c Config) timed(next http.Handler) http.Handler {
	if c.RequestTimeout <= 0 {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeoutCause(r.Context(), c.RequestTimeout, errTooLong)
		defer cancel()
		// The context ends what the engine does; only the connection's own deadline ends a write to a client that reads nothing.
		connection := http.NewResponseController(w)
		_ = connection.SetWriteDeadline(time.Now().Add(c.RequestTimeout + lastWords)) // a writer without one has no such client
		defer connection.SetWriteDeadline(time.Time{})
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

func granted(ctx context.Context, slot int) {
	observe(ctx, Event{Kind: Slot, Slot: slot, Tenant: tenantOf(ctx)})
}

func clearing(ctx context.Context, slot int) { observe(ctx, Event{Kind: Clearing, Slot: slot}) }
