package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// serverOf answers every question with the given event stream.
func serverOf(t *testing.T, stream string) server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/health" {
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, stream)
	}))
	t.Cleanup(s.Close)
	return server{s.URL, s.Client()}
}

func events(texts ...string) string {
	var b strings.Builder
	for _, text := range texts {
		fmt.Fprintf(&b, "data: {\"content\":%q,\"stop\":false}\n\n", text)
	}
	return b.String() + "data: {\"content\":\"\",\"stop\":true}\n\n"
}

func chatEvents(text string) string {
	return fmt.Sprintf("data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":null}}]}\n\n"+
		"data: {\"choices\":[{\"delta\":{\"content\":%q}}]}\n\ndata: [DONE]\n\n", text)
}

func TestCompare(t *testing.T) {
	for _, c := range []struct {
		name, stock, shielded string
		equal                 bool
		err                   string
	}{
		{"equal, cut into other events", events("The sea ", "is calm"), events("The", " sea is calm"), true, ""},
		{"one byte differs", events("The sea is calm"), events("The sea is calm."), false, ""},
		{"a line's end differs", events("The sea"), events("The sea\n"), false, ""},
		{"chat", chatEvents("The sea"), chatEvents("The sea"), true, ""},
		{"chat differs", chatEvents("The sea"), chatEvents("The see"), false, ""},
		{"nothing said", events(), events(), false, "both answers are empty"},
		{"cut", events("The sea"), `data: {"content":"The sea"}` + "\n\n", false, "broke off"},
		{"error event", events("The sea"), `data: {"error":{"message":"the engine stopped"}}` + "\n\n", false, "the engine stopped"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			equal, err := compare(&out, serverOf(t, c.stock), serverOf(t, c.shielded), []question{completion("?")})
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Fatalf("error %v, want %q", err, c.err)
			}
			if equal != c.equal {
				t.Errorf("equal is %v:\n%s", equal, &out)
			}
		})
	}
}

func TestColumnKeepsEveryWord(t *testing.T) {
	text := "The captain\nlooked at the sea, and " + strings.Repeat("x", 2*width+3) + " at \x1b[2Jthe whale – slowly."
	var whole, pieces column
	whole.add(text)
	whole.end()
	for _, r := range text {
		pieces.add(string(r))
	}
	pieces.end()
	if a, b := strings.Join(whole.lines, "|"), strings.Join(pieces.lines, "|"); a != b {
		t.Errorf("lines depend on how the text arrives:\n%s\n%s", a, b)
	}
	if whole.text != text || pieces.text != text {
		t.Error("the text to compare is not what came")
	}
	shown := strings.Join(whole.lines, "")
	for _, word := range []string{"captain", "looked", "whale", "–", "slowly."} {
		if !strings.Contains(shown, word) {
			t.Errorf("%q is not shown: %q", word, whole.lines)
		}
	}
	for _, l := range whole.lines {
		if len([]rune(l)) > width || strings.ContainsRune(l, '\x1b') {
			t.Errorf("line %q is too long, or steers the terminal", l)
		}
	}
}
