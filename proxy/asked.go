package proxy

import (
	"context"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/kvshield/kvshield/internal/fields"
)

// Parameter of a request: what was asked of the model, less the text.
type Parameter struct {
	Name  string // such as "max_tokens", whichever name the API has for it
	Value any    // bool, int64, float64, or for "model" a string
}

// askedFor are the members of a request's body that are looked at, and which parameter each is.
var askedFor = [][2]string{
	{"model", "model"}, {"stream", "stream"},
	{"max_tokens", "max_tokens"}, {"max_completion_tokens", "max_tokens"}, {"max_output_tokens", "max_tokens"}, {"n_predict", "max_tokens"}, {"options.num_predict", "max_tokens"},
	{"temperature", "temperature"}, {"options.temperature", "temperature"},
	{"top_p", "top_p"}, {"options.top_p", "top_p"},
	{"top_k", "top_k"}, {"options.top_k", "top_k"},
	{"seed", "seed"}, {"options.seed", "seed"},
	{"frequency_penalty", "frequency_penalty"}, {"options.frequency_penalty", "frequency_penalty"},
	{"presence_penalty", "presence_penalty"}, {"options.presence_penalty", "presence_penalty"},
	{"n", "choices"}, {"n_cmpl", "choices"},
}

var askedSet = func() *fields.Set {
	var paths []string
	for _, a := range askedFor {
		paths = append(paths, a[0])
	}
	return fields.NewSet(paths...)
}()

// askedMax is how much of a body is looked at.
const askedMax = 8 << 20

// asking looks at a request's body as it is read, whoever reads it.
type asking struct {
	io.ReadCloser
	ctx    context.Context
	mu     sync.Mutex // who closes a body need not be who reads it
	told   bool
	picker *fields.Picker
	left   int
	params []Parameter
}

// ask has the observer told of the request's parameters when its body has been read.
func ask(ctx context.Context, r *http.Request) {
	if r.Method != http.MethodPost || r.Body == nil || r.Body == http.NoBody || r.Header.Get("Content-Encoding") != "" {
		return
	}
	a := &asking{ReadCloser: r.Body, ctx: ctx, left: askedMax}
	a.picker = fields.NewPicker(askedSet, a.found)
	r.Body = a
}

func (a *asking) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	a.look(p[:n])
	if err != nil {
		a.end()
	}
	return n, err
}

func (a *asking) Close() error {
	a.end()
	return a.ReadCloser.Close()
}

func (a *asking) look(p []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p = p[:min(len(p), a.left)]
	a.picker.Feed(p)
	a.left -= len(p)
}

func (a *asking) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.told && len(a.params) > 0 {
		observe(a.ctx, Event{Kind: Asked, Parameters: a.params})
	}
	a.told, a.left = true, 0
}

func (a *asking) found(id int, value []byte, quoted bool) {
	name := askedFor[id][1]
	// More than there are names is the same ones over and over.
	if v := parameter(name, string(value), quoted); v != nil && len(a.params) < len(askedFor) {
		a.params = append(a.params, Parameter{name, v})
	}
}

// parameter is nil for a value that the parameter cannot have.
func parameter(name, value string, quoted bool) any {
	switch {
	case name == "model":
		if quoted && isName(value) {
			return value
		}
		return nil
	case quoted:
		return nil
	case name == "stream":
		if b, err := strconv.ParseBool(value); err == nil && len(value) > 1 {
			return b
		}
		return nil
	}
	if i, err := strconv.ParseInt(value, 10, 64); err == nil {
		return i
	}
	if f, err := strconv.ParseFloat(value, 64); err == nil {
		return f
	}
	return nil
}

// isName is true for what names a model: not for a text that somebody put there.
func isName(s string) bool {
	return s != "" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-:/@+", r))
	}) < 0
}
