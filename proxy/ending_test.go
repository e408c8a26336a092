package proxy

import (
	"bytes"
	"encoding/json"
	"regexp"
	"testing"
	"time"

	"github.com/kvshield/kvshield/proxy/reply"
)

var (
	anyLineEnd = regexp.MustCompile(`\r\n|\n|\r`)
	testCut    = broken(State{}, "in the middle of this answer")
)

// Wherever a stream is cut, its last event is the error and nothing but the error.
func FuzzEndEvents(f *testing.F) {
	for _, s := range []string{"", "d", "data: 1", "data: 1\n", "data: 1\n\n", "data: 1\r\n\r", "data: \x00", ": ping\n\ndata: {", "event: x\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		stream := append(bytes.Clone(sent), endEvents(lastOf(sent), testCut)...)
		if got := lastEvent(stream); !bytes.Equal(got, testCut.JSON()) {
			t.Errorf("after %q the last event is %q", sent, got)
		}
	})
}

// lastEvent is the data of the last event in the stream, by the rules of the format.
func lastEvent(stream []byte) (last []byte) {
	var data [][]byte
	lines := anyLineEnd.Split(string(stream), -1)
	for _, line := range lines[:len(lines)-1] {
		name, value, _ := bytes.Cut([]byte(line), []byte(":"))
		switch {
		case line == "":
			if data != nil {
				last = bytes.Join(data, []byte("\n"))
			}
			data = nil
		case string(name) == "data":
			data = append(data, bytes.TrimPrefix(value, []byte(" ")))
		}
	}
	return last
}

// Wherever lines are cut, the error has a line to itself and no empty line comes before it.
func FuzzEndLines(f *testing.F) {
	for _, s := range []string{"", "{}", "{}\n", "{}\n{\"a", "{}\r\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		tail := endLines(lastOf(sent), testCut)
		lines := bytes.Split(append(bytes.Clone(sent), tail...), []byte("\n"))
		var e struct{ Error string }
		if err := json.Unmarshal(lines[len(lines)-2], &e); err != nil || e.Error != testCut.Message {
			t.Errorf("after %q the last line is %q", sent, lines[len(lines)-2])
		}
		if atLineStart := lastOf(sent) == '\n'; atLineStart == (tail[0] == '\n') {
			t.Errorf("after %q comes %q", sent, tail)
		}
	})
}

func lastOf(sent []byte) byte {
	if len(sent) == 0 {
		return '\n'
	}
	return sent[len(sent)-1]
}

func TestRetrySecondsRoundUp(t *testing.T) {
	for ms, want := range map[int64]int{-5000: 1, 0: 1, 1: 1, 1000: 1, 1001: 2, 2500: 3} {
		if got := reply.RetrySeconds(time.Duration(ms) * time.Millisecond); got != want {
			t.Errorf("%d ms: got %d s, want %d", ms, got, want)
		}
	}
}
