// Package client asks an Ollama server about itself with Ollama's own API package.
//
// Start with [New]. [Address] reads what users write into OLLAMA_HOST; an [Answer] finds the figures at the end of an answer that
// went by. This is the only package of the module that imports Ollama: whoever imports others of kvshield
// neither builds Ollama nor downloads its source.
package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/ollama/ollama/api"
)

// within is how long Ollama may take for an answer about itself.
const within = 2 * time.Second

// Client of one server.
type Client struct {
	api  *api.Client
	http *http.Transport
}

// New makes a client that reaches its server through dial.
func New(dial func(context.Context) (net.Conn, error)) *Client {
	way := &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		DisableKeepAlives: true, // another server may listen there next time
	}
	return &Client{api.NewClient(&url.URL{Scheme: "http", Host: "localhost"}, &http.Client{Transport: way, Timeout: within}), way}
}

// Alive returns nil when the server answers.
func (c *Client) Alive(ctx context.Context) error { return c.api.Heartbeat(ctx) }

// State is what a server says of itself.
type State struct {
	Version   string  `json:"version"`
	Installed int     `json:"models_installed"`
	Loaded    []Model `json:"models_loaded"`
}

// Model is one that is loaded.
type Model struct {
	Name    string    `json:"name"`
	Size    int64     `json:"size_bytes"`
	Context int       `json:"context_length"`
	Expires time.Time `json:"expires_at"`
}

// State asks for the version and the models.
func (c *Client) State(ctx context.Context) (State, error) {
	version, err := c.api.Version(ctx)
	if err != nil {
		return State{}, err
	}
	installed, err := c.api.List(ctx)
	if err != nil {
		return State{}, err
	}
	running, err := c.api.ListRunning(ctx)
	if err != nil {
		return State{}, err
	}
	s := State{Version: version, Installed: len(installed.Models), Loaded: []Model{}}
	for _, m := range running.Models {
		s.Loaded = append(s.Loaded, Model{m.Name, m.Size, m.ContextLength, m.ExpiresAt.UTC().Truncate(time.Second)})
	}
	return s, nil
}

// ErrCloud is a server that may send conversations to another machine.
var ErrCloud = errors.New("it may pass conversations on to Ollama's cloud")

// Local returns nil when the server has its cloud features off, and so answers no request by sending it somewhere else. An older server
// that does not say whether it has any is not taken to have none.
func (c *Client) Local(ctx context.Context) error {
	s, err := c.api.CloudStatusExperimental(ctx)
	var status api.StatusError
	switch {
	case errors.As(err, &status) && status.StatusCode == http.StatusNotFound:
		return fmt.Errorf("%w: this version does not say whether it does", ErrCloud)
	case err != nil:
		return err
	case !s.Cloud.Disabled:
		return ErrCloud
	}
	return nil
}
