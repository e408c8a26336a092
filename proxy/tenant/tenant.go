// Package tenant keeps what one API key's requests leave in the engine out of another key's requests.
//
// A llama-server reuses the tokens that are cached in a slot when a request begins with the same ones. The pool therefore gives each
// request a slot by name (id_slot), knows whose tokens are in it, and has the engine replace them by a token of nobody's
// before another tenant gets the slot. A slot counts as free when the engine has hung up on the request: one that was cancelled may
// run for a moment longer. Requests for which no slot can be named, or that take several, get the engine to themselves.
//
// It relies on an engine that was started with --cache-ram 0 and without speculative decoding: no cache but the slots'. What is not known to be safe is refused.
package tenant

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/kvshield/kvshield/proxy/reply"
)

const (
	bodyTimeout    = time.Minute
	defaultMaxBody = 64 << 20
	retryAfter     = 2 * time.Second
)

// Config of a handler.
type Config struct {
	Pool    *Pool
	Of      func(context.Context) string        // whose request it is
	MaxBody int64                               // of a request, which is held in memory; 0: 64 MiB
	Granted func(ctx context.Context, slot int) // is told which slot a request has, AllSlots or AnySlot
	Flush   http.RoundTripper                   // to the engine, by way of Dialer
	// Clearing is told of a slot before it is cleared of what another tenant left. It may be nil.
	Clearing func(ctx context.Context, slot int)
}

// use of the engine by a path.
type use int

const (
	refused  use = iota
	slotless     // touches no slot
	pinned       // takes the slot it is told
	alone        // takes a slot that it cannot be told
	embeds       // the same, and cannot be flushed
)

var uses = map[string]use{
	"GET /health": slotless, "GET /v1/health": slotless, "GET /models": slotless, "GET /v1/models": slotless, "GET /props": slotless,
	"GET /metrics": slotless, "GET /lora-adapters": slotless,
	"POST /tokenize": slotless, "POST /detokenize": slotless, "POST /apply-template": slotless, "POST /v1/messages/count_tokens": slotless,
	"POST /chat/completions/input_tokens": slotless, "POST /v1/chat/completions/input_tokens": slotless,
	"POST /responses/input_tokens": slotless, "POST /v1/responses/input_tokens": slotless,
	"POST /completion": pinned, "POST /completions": pinned, "POST /v1/completions": pinned, "POST /infill": pinned,
	"POST /chat/completions": pinned, "POST /v1/chat/completions": pinned, "POST /responses": pinned, "POST /v1/responses": pinned,
	"POST /v1/messages": alone, "POST /audio/transcriptions": alone, "POST /v1/audio/transcriptions": alone,
	"POST /embedding": embeds, "POST /embeddings": embeds, "POST /v1/embeddings": embeds, "POST /rerank": embeds, "POST /reranking": embeds,
	"POST /v1/rerank": embeds, "POST /v1/reranking": embeds,
}

func useOf(r *http.Request) use {
	if r.URL.RawPath != "" {
		return refused
	}
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	if method == http.MethodOptions || method == http.MethodGet && isFile(r.URL.Path) {
		return slotless
	}
	return uses[method+" "+r.URL.Path]
}

// isFile is true for what a page is made of: no route of the engine has a dot in it.
func isFile(path string) bool { return path == "/" || bytes.ContainsRune([]byte(path), '.') }

// passed on are the headers that mean something to the engine's answer. X-Conversation-Id and the like would keep an
// answer where other clients can ask for it.
var passed = []string{"Accept", "Accept-Encoding", "Accept-Language", "Content-Type", "If-None-Match", "Origin", "User-Agent",
	"Access-Control-Request-Method", "Access-Control-Request-Headers", "Traceparent", "Tracestate", "Expect"}

// Handler passes requests on to the engine, each in a slot of its tenant.
func Handler(c Config, next http.Handler) http.Handler {
	if c.MaxBody <= 0 {
		c.MaxBody = defaultMaxBody
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = r.Clone(r.Context())
		header := http.Header{}
		for _, name := range passed {
			if v := r.Header.Values(name); len(v) > 0 {
				header[name] = v
			}
		}
		encoded := r.Header.Get("Content-Encoding") != ""
		r.Header = header
		how := useOf(r)
		switch {
		case how == slotless && !encoded, how == embeds && c.Pool.KeepsNothing && !encoded:
			next.ServeHTTP(w, r)
		case encoded:
			reply.Failure{Message: "an encoded body is refused where API keys are kept apart; send it plain", Type: reply.BadRequest, Code: http.StatusUnsupportedMediaType}.Write(w)
		case how == pinned:
			c.pin(w, r, next)
		case how == alone:
			c.hold(w, r, next, true, func(*http.Request, int) {})
		case how == embeds:
			refuse(w, "the engine cannot be kept from reusing one key's texts for another's in embeddings of this model")
		default:
			refuse(w, "this path could show one key's requests to another")
		}
	})
}

func refuse(w http.ResponseWriter, why string) {
	reply.Failure{
		Message: "refused: " + why + "; if all keys may share what the engine has cached, start kvshield serve with --share-prefix",
		Type:    reply.Permission,
		Code:    http.StatusForbidden,
	}.Write(w)
}

// pin names the slot in the request's body.
func (c Config) pin(w http.ResponseWriter, r *http.Request, next http.Handler) {
	text, f := c.read(w, r)
	if f != nil {
		f.Write(w)
		return
	}
	b, err := parse(text)
	if err != nil {
		reply.Failure{Message: err.Error() + "; send one", Type: reply.BadRequest, Code: http.StatusBadRequest}.Write(w)
		return
	}
	c.hold(w, r, next, b.many, func(r *http.Request, slot int) {
		replace(r, b.in(slot)) // -1 for any, when all slots are this request's
		r.Header.Set("Content-Type", "application/json")
	})
}

// replace gives a request of our own another body.
func replace(r *http.Request, text []byte) {
	r.Body, r.ContentLength, r.TransferEncoding = io.NopCloser(bytes.NewReader(text)), int64(len(text)), nil
	r.Header.Set("Content-Length", strconv.Itoa(len(text)))
}

func (c Config) read(w http.ResponseWriter, r *http.Request) ([]byte, *reply.Failure) {
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(bodyTimeout))
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, c.MaxBody))
	_ = rc.SetReadDeadline(time.Time{})
	switch {
	case err == nil:
		return text, nil
	case errors.As(err, new(*http.MaxBytesError)):
		return nil, &reply.Failure{Message: "the request body is larger than this server takes; send less, or have --max-body raised", Type: reply.BadRequest, Code: http.StatusRequestEntityTooLarge}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &reply.Failure{Message: "the request body took too long to arrive; send it faster", Type: reply.BadRequest, Code: http.StatusRequestTimeout}
	}
	return nil, &reply.Failure{Message: "the request body broke off; send the request again", Type: reply.BadRequest, Code: http.StatusBadRequest}
}

// hold serves a request in a slot of its tenant, or in all, from which what is not the tenant's was flushed.
func (c Config) hold(w http.ResponseWriter, r *http.Request, next http.Handler, all bool, prepare func(r *http.Request, slot int)) {
	tenant := c.Of(r.Context())
	if tenant == "" {
		refuse(w, "a request without a key has no slot")
		return
	}
	l, err := c.Pool.Acquire(r.Context(), tenant, all)
	if errors.Is(err, ErrLate) {
		reply.Failure{Message: "the request waited for a slot longer than this server lets one; send it again in a moment", Type: reply.Unavailable, Code: http.StatusServiceUnavailable}.WriteRetry(w, retryAfter)
		return
	}
	if err != nil {
		panic(http.ErrAbortHandler) // the client has left
	}
	defer l.Finish()
	r = r.WithContext(withLease(r.Context(), l))
	for _, id := range l.foreign() {
		l.own(id, "")
		if c.Clearing != nil {
			c.Clearing(r.Context(), id)
		}
		if flush(r.Context(), c.Flush, id) != nil {
			reply.Failure{Message: "a slot of the engine could not be cleared of another key's tokens; send the request again in a moment", Type: reply.Unavailable, Code: http.StatusServiceUnavailable}.WriteRetry(w, retryAfter)
			return
		}
		l.own(id, tenant)
	}
	c.granted(r.Context(), l.Slot())
	prepare(r, l.Slot())
	next.ServeHTTP(w, r)
}
