package proxy_test

import (
	"bytes"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net/http"
	"testing"
)

const bigBody = 32 << 20

// A large body goes both ways, and the first of it is with the other side while the last is not
// written yet: nothing in between holds the whole.
func TestLargeBodiesAreStreamed(t *testing.T) {
	begun, checked := make(chan struct{}), make(chan struct{})
	sum := make(chan []byte, 1)
	s, _ := front(t, httpEngine(t, func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		io.CopyN(h, r.Body, 1<<10)
		close(begun)
		io.Copy(h, r.Body)
		sum <- h.Sum(nil)
		io.CopyN(w, noise(), 1<<20)
		http.NewResponseController(w).Flush()
		<-checked
		io.CopyN(w, rest(), bigBody-1<<20)
	}))

	body, send := io.Pipe()
	sent := sha256.New()
	go func() {
		w := io.MultiWriter(send, sent)
		io.CopyN(w, noise(), 1<<20)
		<-begun
		io.CopyN(w, rest(), bigBody-1<<20)
		send.Close()
	}()
	r, err := s.Client().Post(s.URL, "application/octet-stream", body)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if !bytes.Equal(<-sum, sent.Sum(nil)) {
		t.Error("the engine got another body than was sent")
	}
	got := sha256.New()
	first, err := io.CopyN(got, r.Body, 1<<10)
	close(checked)
	n, err2 := io.Copy(got, r.Body)
	if first+n != bigBody || err != nil || err2 != nil {
		t.Fatalf("got %d bytes, %v, %v", first+n, err, err2)
	}
	if !bytes.Equal(got.Sum(nil), sent.Sum(nil)) {
		t.Error("the client got another body than was sent")
	}
}

// noise and rest are the first and the second part of the same body each time.
func noise() io.Reader { return rand.NewChaCha8([32]byte{1}) }
func rest() io.Reader  { return rand.NewChaCha8([32]byte{2}) }
