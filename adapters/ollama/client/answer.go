package client

import (
	"bytes"
	"encoding/json"

	"github.com/ollama/ollama/api"
)

// maxLine of an answer is looked at. The last object of /api/generate may carry the context as numbers.
const maxLine = 1 << 20

// Answer is fed with the body of an answer of Ollama's own API as it goes by, streamed or not, and keeps no more of it than its last line.
type Answer struct {
	line  []byte
	ended bool // with the line's end
	long  bool // the line is longer than is kept
}

// Write takes a part of the body.
func (a *Answer) Write(p []byte) (int, error) {
	for part := range bytes.Lines(p) {
		if a.ended {
			a.line, a.long = a.line[:0], false
		}
		a.ended = part[len(part)-1] == '\n'
		if a.long = a.long || len(a.line)+len(part) > maxLine; a.long {
			a.line = a.line[:0]
			continue
		}
		a.line = append(a.line, part...)
	}
	return len(p), nil
}

// Figures are what an answer cost, as Ollama counts it.
type Figures struct {
	Model string
	api.Metrics
}

// Figures of an answer that is complete; false for one that was cut, or that has none.
func (a *Answer) Figures() (Figures, bool) {
	var last struct {
		Model string `json:"model"`
		api.Metrics
	}
	if err := json.Unmarshal(a.line, &last); err != nil || last.TotalDuration == 0 {
		return Figures{}, false
	}
	return Figures{last.Model, last.Metrics}, true
}
