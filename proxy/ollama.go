package proxy

import (
	"net/http"
	"strings"
)

// ollamaPaths are those of Ollama's own API.
const ollamaPaths = "/api/"

// plain has errors written as Ollama's clients read them, where they talk Ollama's own API.
func plain(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, ollamaPaths) {
			w = plainWriter{w}
		}
		next.ServeHTTP(w, r)
	})
}

type plainWriter struct{ http.ResponseWriter }

func (w plainWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Plain tells reply.Failure.
func (plainWriter) Plain() {}

// isFile is true for the upload of a file that a model is made of. It passes through to Ollama's disk and is nowhere held.
func isFile(r *http.Request) bool {
	digest, ok := strings.CutPrefix(r.URL.Path, ollamaPaths+"blobs/")
	return ok && r.Method == http.MethodPost && !strings.Contains(digest, "/")
}
