package proxy_test

import (
	"io"
	"log"
	"net/http"
	"strings"
	"testing"
)

const canary = "canary-5b1f"

// Whatever way the engine fails in, and wherever the conversation stands, no log line and no
// error body repeats it.
func TestConversationStaysOutOfLogsAndErrors(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for name, answer := range map[string]string{
		"no answer":            "",
		"not HTTP":             canary + "\r\n\r\n",
		"bad status":           "HTTP/1.1 " + canary + "\r\n\r\n",
		"bad header":           ok + canary + "\r\n\r\n",
		"bad length":           ok + "Content-Length: " + canary + "\r\n\r\n",
		"bad encoding":         ok + "Transfer-Encoding: " + canary + "\r\n\r\n",
		"unknown upgrade":      "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: " + canary + "\r\n\r\n",
		"bad chunk":            ok + "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + canary + "\r\n",
		"bad chunk elsewhere":  ok + "Transfer-Encoding: chunked\r\n\r\n" + canary + "\r\n",
		"bad trailer":          ok + "Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + canary + "\r\n\r\n",
		"more than the length": ok + "Content-Length: 1\r\n\r\nx" + canary,
		"no known ending":      ok + "\r\n" + canary,
	} {
		t.Run(name, func(t *testing.T) {
			std := captureStandardLog(t)
			s, logs := front(t, rawEngine(t, func(w io.Writer) { io.WriteString(w, answer) }))
			req, _ := http.NewRequest("POST", s.URL+"/"+canary+"?q="+canary, strings.NewReader(canary))
			req.Header.Set("X-User", canary)
			var body []byte
			// An error here is an aborted connection, which is one of the right answers.
			if r, err := s.Client().Do(req); err == nil {
				body, _ = io.ReadAll(r.Body)
				r.Body.Close()
			}
			s.Close()
			for where, text := range map[string]string{
				"log": logs.String(), "body": string(body),
			} {
				if strings.Contains(text, canary) {
					t.Errorf("the %s repeats the conversation: %s", where, text)
				}
			}
			if std.String() != "" {
				t.Errorf("the standard log, which is nobody's, says: %s", std)
			}
		})
	}
}

// captureStandardLog catches what net/http writes past any logger it was given.
func captureStandardLog(t *testing.T) *syncBuffer {
	b := new(syncBuffer)
	before := log.Writer()
	log.SetOutput(b)
	t.Cleanup(func() { log.SetOutput(before) })
	return b
}
