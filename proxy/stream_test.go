package proxy_test

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"testing"
)

// Every event reaches the client before the engine makes the next one.
func TestEventsArriveOneByOne(t *testing.T) {
	for _, kind := range []string{"text/event-stream", "application/x-ndjson", "text/plain"} {
		t.Run(kind, func(t *testing.T) {
			next := make(chan struct{})
			s, _ := front(t, httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", kind)
				for i := range 5 {
					fmt.Fprintf(w, "data: %d\n", i)
					http.NewResponseController(w).Flush()
					select {
					case <-next:
					case <-r.Context().Done():
						return
					}
				}
			}))
			r, err := s.Client().Get(s.URL)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Body.Close()
			lines := bufio.NewReader(r.Body)
			for i := range 5 {
				got, err := lines.ReadString('\n')
				if want := fmt.Sprintf("data: %d\n", i); got != want || err != nil {
					t.Fatalf("got %q, %v; want %q", got, err, want)
				}
				next <- struct{}{}
			}
			if rest, err := io.ReadAll(lines); len(rest) > 0 || err != nil {
				t.Fatalf("after the end: %q, %v", rest, err)
			}
		})
	}
}

// The header alone reaches the client: a prefill may be long before the first token.
func TestHeaderArrivesBeforeTheBody(t *testing.T) {
	release := make(chan struct{})
	s, _ := front(t, httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		http.NewResponseController(w).Flush()
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}))
	r, err := s.Client().Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	close(release)
	if rest, err := io.ReadAll(r.Body); len(rest) > 0 || err != nil {
		t.Fatalf("body: %q, %v", rest, err)
	}
}
