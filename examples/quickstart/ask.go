// Command quickstart asks a stock and a shielded llama-server the same questions and shows both
// answers side by side while they are streamed. It is the part of demo.sh that reads answers:
//
//	go run ./examples/quickstart STOCK SHIELDED
//
// Each server is an http:// address or the path of a Unix socket. The exit code is 0 when all
// answers are equal, byte for byte, and 1 when one differs or could not be had.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

const (
	tokens      = 120
	healthyIn   = time.Minute
	answerIn    = 5 * time.Minute
	healthEvery = 100 * time.Millisecond
	maxLine     = 1 << 20 // of an event stream
)

// question is a request that either API answers.
type question struct {
	api, path, text string
	body            map[string]any
}

func completion(prompt string) question {
	return question{"/completion", "/completion", prompt, map[string]any{"prompt": prompt, "n_predict": tokens}}
}

func chat(text string) question {
	message := map[string]string{"role": "user", "content": text}
	return question{"OpenAI chat", "/v1/chat/completions", text, map[string]any{"messages": []any{message}, "max_tokens": tokens}}
}

var questions = []question{
	completion("At last"),
	completion("Fellow citizens of the Senate"),
	chat("Describe the harpoon."),
	chat("Who are you?"),
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: quickstart STOCK SHIELDED (each an http:// address or a socket's path)")
		os.Exit(2)
	}
	equal, err := compare(os.Stdout, connect(os.Args[1]), connect(os.Args[2]), questions)
	if err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
	if !equal {
		os.Exit(1)
	}
}

// server is where to send questions.
type server struct {
	base   string
	client *http.Client
}

// connect opens a connection for each request: a server may close an idle one just as it is used again.
func connect(address string) server {
	transport := &http.Transport{DisableKeepAlives: true}
	if strings.HasPrefix(address, "http://") {
		return server{address, &http.Client{Transport: transport}}
	}
	transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", address)
	}
	return server{"http://llama-server", &http.Client{Transport: transport}}
}

// awaitHealth returns when the server has loaded its model.
func (s server) awaitHealth(ctx context.Context) error {
	for {
		resp, err := s.client.Get(s.base + "/health")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the server at %s is not ready after %v", s.base, healthyIn)
		case <-time.After(healthEvery):
		}
	}
}

// ask sends the question and calls piece with every part of the answer as it arrives.
func (s server) ask(ctx context.Context, q question, piece func(string)) error {
	// Greedy decoding, and nothing remembered from an earlier question.
	request := map[string]any{"stream": true, "temperature": 0, "cache_prompt": false}
	for key, value := range q.body {
		request[key] = value
	}
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, s.base+q.path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := s.client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return fmt.Errorf("%s answered %s: %s", q.path, resp.Status, bytes.TrimSpace(text))
	}
	return readEvents(resp.Body, piece)
}

// event is what is of interest in an event of either API.
type event struct {
	Content string
	Stop    bool
	Choices []struct {
		Delta struct{ Content string }
	}
	Error *struct{ Message string }
}

// readEvents takes the text out of an event stream. A stream that ends without saying so is an error.
func readEvents(r io.Reader, piece func(string)) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	finished := false
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		if data == "[DONE]" {
			finished = true
			continue
		}
		var e event
		if err := json.Unmarshal([]byte(data), &e); err != nil {
			return fmt.Errorf("an event is not JSON: %w", err)
		}
		if e.Error != nil {
			return fmt.Errorf("the answer broke off: %s", e.Error.Message)
		}
		finished = finished || e.Stop
		for _, c := range e.Choices {
			e.Content += c.Delta.Content
		}
		piece(e.Content)
	}
	if err := lines.Err(); err != nil {
		return err
	}
	if !finished {
		return fmt.Errorf("the answer broke off without an end")
	}
	return nil
}
