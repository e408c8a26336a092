package proxy_test

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
)

// A client that leaves stops the engine's work, whatever stage it is in.
func TestClientDisconnectCancelsTheEngine(t *testing.T) {
	for name, answered := range map[string]bool{"before the header": false, "in mid-answer": true} {
		t.Run(name, func(t *testing.T) {
			arrived, cancelled := make(chan struct{}), make(chan struct{})
			s, logs := front(t, httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				if answered {
					w.Header().Set("Content-Type", "text/event-stream")
					io.WriteString(w, "data: 1\n\n")
					http.NewResponseController(w).Flush()
				}
				close(arrived)
				<-r.Context().Done()
				close(cancelled)
			}))
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			gone, reading := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(gone)
				req, _ := http.NewRequestWithContext(ctx, "POST", s.URL, strings.NewReader("{}"))
				if r, err := s.Client().Do(req); err == nil {
					r.Body.Read(make([]byte, 1))
					close(reading)
					io.Copy(io.Discard, r.Body)
					r.Body.Close()
				}
			}()
			wait(t, arrived, "the request reaches the engine")
			if answered {
				wait(t, reading, "the answer reaches the client")
			}
			leave()
			wait(t, cancelled, "the engine's request is cancelled")
			wait(t, gone, "the client's request ends")
			s.Close()
			if logs.String() != "" {
				t.Errorf("a client that leaves is no failure, but was logged: %s", logs)
			}
		})
	}
}
