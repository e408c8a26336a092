package proxy_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/proxy"
)

// cutAfter answers with a header and one chunk, and then breaks off: inside a chunk, or between two.
func cutAfter(header, chunk string, inside bool) func(io.Writer) {
	return func(w io.Writer) {
		fmt.Fprintf(w, "HTTP/1.1 200 OK\r\n%sTransfer-Encoding: chunked\r\n\r\n", header)
		if inside {
			fmt.Fprintf(w, "%x\r\n%s", len(chunk)+100, chunk)
			return
		}
		fmt.Fprintf(w, "%x\r\n%s\r\n", len(chunk), chunk)
	}
}

func TestCutEventStreamEndsWithAnErrorEvent(t *testing.T) {
	const whole = "data: {\"content\":\"one\"}\n\n"
	for name, sent := range map[string]string{
		"nothing sent":          "",
		"between events":        whole,
		"in an event":           whole + "data: {\"content\":\"tw",
		"before the blank line": whole + "data: {\"content\":\"two\"}\n",
		"carriage returns":      "data: {\"content\":\"one\"}\r\n\r\ndata: {\r",
	} {
		for _, inside := range []bool{true, false} {
			if sent == "" && !inside {
				continue // that is the last chunk, and a clean end
			}
			t.Run(fmt.Sprintf("%s/inside=%t", name, inside), func(t *testing.T) {
				s, _ := front(t, rawEngine(t, cutAfter("Content-Type: text/event-stream; charset=utf-8\r\n", sent, inside)))
				_, body, err := get(t, s, "/")
				if err != nil || !strings.HasPrefix(body, sent) {
					t.Fatalf("body %q, %v; want it to begin with %q", body, err, sent)
				}
				if strings.Contains(body, "[DONE]") {
					t.Errorf("a cut stream has a [DONE]: %q", body)
				}
				list := events(body)
				f := failureIn(t, list[len(list)-1])
				if f.Code != http.StatusBadGateway || f.Type != "server_error" {
					t.Errorf("error event: %+v", f)
				}
				for _, e := range list[:len(list)-1] {
					if strings.Contains(e, "error") {
						t.Errorf("more than one error event in %q", body)
					}
				}
			})
		}
	}
}

// events reads the data of every event, as a client would.
func events(stream string) []string {
	var all, data []string
	for line := range strings.Lines(strings.ReplaceAll(stream, "\r\n", "\n")) {
		line = strings.TrimSuffix(line, "\n")
		if value, ok := strings.CutPrefix(line, "data:"); ok {
			data = append(data, strings.TrimPrefix(value, " "))
		}
		if line == "" && len(data) > 0 {
			all = append(all, strings.Join(data, "\n"))
			data = nil
		}
	}
	return all
}

func TestCutLinesEndWithAnErrorLine(t *testing.T) {
	for name, sent := range map[string]string{
		"between lines": "{\"response\":\"one\"}\n",
		"in a line":     "{\"response\":\"one\"}\n{\"respon",
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := front(t, rawEngine(t, cutAfter("Content-Type: application/x-ndjson\r\n", sent, true)))
			_, body, err := get(t, s, "/")
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimPrefix(body, strings.TrimSuffix(sent, "\n")+"\n"), "\n")
			if len(lines) != 2 || lines[1] != "" {
				t.Fatalf("body %q; want what was sent and one line", body)
			}
			var last struct{ Error string }
			if err := json.Unmarshal([]byte(lines[0]), &last); err != nil || last.Error == "" {
				t.Errorf("error line %q: %v", lines[0], err)
			}
		})
	}
}

// What has no room for an error must not look finished.
func TestOtherCutBodiesAreBrokenOff(t *testing.T) {
	for name, answer := range map[string]func(io.Writer){
		"json in chunks":  cutAfter("Content-Type: application/json\r\n", `{"a":1}`, false),
		"no content type": cutAfter("", "abc", true),
		"encoded events":  cutAfter("Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\n", "abc", false),
		"json with a length": func(w io.Writer) {
			io.WriteString(w, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n{\"a\":1}")
		},
		"events with a length": func(w io.Writer) {
			io.WriteString(w, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 5000\r\n\r\ndata: 1\n\n")
		},
		"broken chunk": func(w io.Writer) {
			io.WriteString(w, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nnot a length\r\n")
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, logs := front(t, rawEngine(t, answer))
			_, body, err := get(t, s, "/")
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("body %q, error %v; want an unexpected end", body, err)
			}
			if strings.Contains(body, "error") {
				t.Errorf("something was added to %q", body)
			}
			s.Close()
			if got := logs.String(); strings.Contains(got, "level=ERROR") || strings.Contains(got, "panic") {
				t.Errorf("the abort was logged as an error:\n%s", got)
			}
			if !strings.Contains(logs.String(), "in the middle of an answer") {
				t.Errorf("the engine's end was not logged:\n%s", logs)
			}
		})
	}
}

func TestErrorEventGivesTheReason(t *testing.T) {
	l := rawEngine(t, cutAfter("Content-Type: text/event-stream\r\n", "data: 1\n\n", true))
	asked := 0 // the gate asks first, and the ending once the engine is gone
	s, _ := frontWith(t, proxy.Config{Dial: dialer(l), State: func() proxy.State {
		asked++
		return proxy.State{Ready: asked == 1, Reason: "the enclave is restarting"}
	}})
	_, body, err := get(t, s, "/")
	if err != nil || !strings.Contains(body, "the enclave is restarting") {
		t.Errorf("body %q, %v; want the reason in it", body, err)
	}
}

func TestFinishedStreamIsLeftAlone(t *testing.T) {
	const sent = "data: {\"content\":\"one\"}\n\ndata: [DONE]\n\n"
	s, logs := front(t, rawEngine(t, func(w io.Writer) {
		cutAfter("Content-Type: text/event-stream\r\n", sent, false)(w)
		io.WriteString(w, "0\r\n\r\n")
	}))
	if _, body, err := get(t, s, "/"); body != sent || err != nil {
		t.Errorf("got %q, %v", body, err)
	}
	if logs.String() != "" {
		t.Errorf("logged: %s", logs)
	}
}
