package play

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/audit/slotfile"
)

// client asks a llama-server that this package started.
type client struct {
	server *llamacpp.Server
	http   *http.Client
	dir    string // where the server saves its slots
}

// launch starts a llama-server with one slot and waits until it has loaded its model.
func launch(ctx context.Context, c llamacpp.ServerConfig, dir string) (*client, error) {
	c.Socket = filepath.Join(dir, "engine.sock")
	c.Args = append([]string{"-np", "1", "--slot-save-path", dir + "/", "-ngl", "999", "--no-repack"}, c.Args...)
	server, err := llamacpp.StartServer(c)
	if err != nil {
		return nil, err
	}
	if err := server.WaitHealthy(ctx); err != nil {
		server.Stop()
		var exit *llamacpp.ExitError
		if errors.As(err, &exit) {
			return nil, fmt.Errorf("%w; its last lines:\n%s", err, exit.Tail)
		}
		return nil, err
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return server.Dial(ctx) }}
	return &client{server, &http.Client{Transport: transport}, dir}, nil
}

func (c *client) close() {
	c.http.CloseIdleConnections()
	c.server.Stop()
}

// post sends a request and decodes the answer. Neither is ever part of an error: they hold the conversation.
func (c *client) post(ctx context.Context, path string, request, answer any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://engine"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	return c.do(r, answer)
}

func (c *client) get(ctx context.Context, path string, answer any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://engine"+path, nil)
	if err != nil {
		return err
	}
	return c.do(r, answer)
}

func (c *client) do(r *http.Request, answer any) error {
	resp, err := c.http.Do(r)
	if err != nil {
		select {
		case <-c.server.Done():
			return c.server.Err()
		default:
			return err
		}
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		what, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return fmt.Errorf("the engine refused %s: %s: %s", r.URL.Path, resp.Status, message(what))
	}
	return json.NewDecoder(resp.Body).Decode(answer)
}

func message(body []byte) string {
	var e struct {
		Error struct{ Message string }
	}
	_ = json.Unmarshal(body, &e)
	return strings.TrimSpace(e.Error.Message)
}

func (c *client) tokenize(ctx context.Context, text string) ([]int32, error) {
	var a struct{ Tokens []int32 }
	err := c.post(ctx, "/tokenize", map[string]any{"content": text, "add_special": true, "parse_special": true}, &a)
	return a.Tokens, err
}

// pieces are the texts of tokens.
func (c *client) pieces(ctx context.Context, tokens []int32) ([]string, error) {
	known := map[int32]string{}
	out := make([]string, len(tokens))
	for i, t := range tokens {
		if t < 0 {
			continue
		}
		text, ok := known[t]
		if !ok {
			var a struct{ Content string }
			if err := c.post(ctx, "/detokenize", map[string]any{"tokens": []int32{t}}, &a); err != nil {
				return nil, err
			}
			text = a.Content
			known[t] = text
		}
		out[i] = text
	}
	return out, nil
}

// completion is what the engine answers.
type completion struct {
	Tokens []int32
	Probs  []struct {
		Top []struct{ ID int32 } `json:"top_logprobs"`
	} `json:"completion_probabilities"`
}

func (c *client) complete(ctx context.Context, prompt []int32, n int, more map[string]any) (*completion, error) {
	request := map[string]any{"prompt": prompt, "n_predict": n, "temperature": 0, "cache_prompt": true, "id_slot": 0, "return_tokens": true, "ignore_eos": true}
	for k, v := range more {
		request[k] = v
	}
	var a completion
	return &a, c.post(ctx, "/completion", request, &a)
}

// slot saves what is cached, reads it, and removes the file. The number of tokens is for a sealed file, which does not tell.
func (c *client) slot(ctx context.Context, shape slotfile.Shape, tokens int) (*slotfile.File, error) {
	const name = "slot.bin"
	path := filepath.Join(c.dir, name)
	defer os.Remove(path)
	var a struct{}
	if err := c.post(ctx, "/slots/0?action=save", map[string]any{"filename": name}, &a); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if slotfile.IsSealed(b) {
		return &slotfile.File{Snapshot: slotfile.Sealed(b, shape, max(tokens, 1)), Sealed: len(b)}, nil
	}
	return slotfile.Parse(b, shape)
}
