package memory

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/internal/gguf"
)

const patience = 60 * time.Second

var root = filepath.Join("..", "..")

// weights reads a tensor of F16 or F32 numbers; its rows are output features.
func weights(t *testing.T, in *os.File, g *gguf.File, name string) audit.Matrix {
	t.Helper()
	w, ok := g.Tensor(name)
	if !ok {
		t.Fatalf("the demo model has no %s", name)
	}
	raw := make([]byte, w.Size)
	if _, err := in.ReadAt(raw, g.DataOffset+w.Offset); err != nil {
		t.Fatal(err)
	}
	m := audit.NewMatrix(int(w.Rows()), int(w.Dims[0]))
	for i := range m.Data {
		switch w.Type {
		case gguf.F16:
			m.Data[i] = half(binary.LittleEndian.Uint16(raw[2*i:]))
		case gguf.F32:
			m.Data[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
		default:
			t.Fatalf("%s is %s", name, w.Type)
		}
	}
	return m
}

// demoValues is what layer 0 of the demo model caches as values: W_v of the token's embedding after the layer's RMS norm.
func demoValues(t *testing.T, model string) audit.Matrix {
	t.Helper()
	in, g, err := gguf.Open(model)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	eps, ok, err := g.Float("llama.attention.layer_norm_rms_epsilon")
	if err != nil || !ok {
		t.Fatalf("no epsilon: %v", err)
	}
	embeddings, norm, wv := weights(t, in, g, "token_embd.weight"), weights(t, in, g, "blk.0.attn_norm.weight"), weights(t, in, g, "blk.0.attn_v.weight")
	values := audit.NewMatrix(embeddings.Rows, wv.Rows)
	for x := range values.Rows {
		squares := 0.0
		for _, v := range embeddings.Row(x) {
			squares += float64(v) * float64(v)
		}
		scale := 1 / math.Sqrt(squares/float64(embeddings.Cols)+eps)
		for i := range values.Cols {
			sum := 0.0
			for j, v := range embeddings.Row(x) {
				sum += float64(wv.Row(i)[j]) * float64(v) * scale * float64(norm.Data[j])
			}
			values.Row(x)[i] = float32(sum)
		}
	}
	return values
}

// server is a stock llama-server with the demo model.
type server struct {
	*llamacpp.Server
	client *http.Client
}

func startServer(t *testing.T, model string, args ...string) *server {
	t.Helper()
	program := filepath.Join(root, ".engine", "bin", "llama-server")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: run `make engine`", err)
	}
	dir, err := os.MkdirTemp("/tmp", "kvs") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: program, Model: model, Socket: filepath.Join(dir, "s.sock"), Args: args, Env: os.Environ()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.WaitHealthy(ctx); err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Dial(ctx) }}
	t.Cleanup(transport.CloseIdleConnections)
	return &server{s, &http.Client{Transport: transport, Timeout: patience}}
}

// tokens asks the server, and returns the tokens that it answers.
func (s *server) tokens(t *testing.T, path string, request map[string]any) []int32 {
	t.Helper()
	body, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.client.Post("http://stock"+path, "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct{ Tokens []int32 }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v", path, resp.Status, err)
	}
	return answer.Tokens
}

// agreement is the share of truth that a run has at its place, when laid where it fits best.
func agreement(run, truth []int32) float64 {
	best := 0
	for shift := -len(truth) + 1; shift < len(run); shift++ {
		same := 0
		for i, token := range truth {
			if at := shift + i; at >= 0 && at < len(run) && run[at] == token {
				same++
			}
		}
		best = max(best, same)
	}
	return float64(best) / float64(len(truth))
}

func TestRealEngine(t *testing.T) {
	model := filepath.Join(root, "examples", "model", "demo.gguf")
	s := NewScanner(demoValues(t, model))
	prompt := strings.Repeat("It was the best of times, it was the worst of times, it was the age of wisdom. ", 3) +
		"The sailors went on board before the morning, and the captain gave them each a gold coin for their trouble."
	for _, kind := range []string{"f16", "f32"} {
		t.Run(kind, func(t *testing.T) {
			server := startServer(t, model, "-t", "1", "-np", "1", "-c", "2048", "-fa", "on", "-ctk", kind, "-ctv", kind)
			truth := server.tokens(t, "/tokenize", map[string]any{"content": prompt, "add_special": true})
			answer := server.tokens(t, "/completion", map[string]any{"prompt": prompt, "n_predict": 40, "temperature": 0, "ignore_eos": true,
				"return_tokens": true, "cache_prompt": true})
			truth = append(truth, answer[:len(answer)-1]...) // the last was never computed on
			if len(truth) < 140 {
				t.Fatalf("only %d tokens", len(truth))
			}
			began := time.Now()
			found, err := s.Search(t.Context(), server.PID(), nil)
			if err != nil {
				t.Fatal(err)
			}
			took := time.Since(began)
			said := fmt.Sprintf("%d tokens; %d hits in %d MiB read, %d empty, %d KiB holes, %d MiB skipped, %v", len(truth), len(found.Hits), found.Read>>20,
				found.Empty>>20, found.Holes>>10, found.Skipped>>20, took)
			best := 0.0
			for _, r := range Runs(found.Hits) {
				if r.Type == strings.ToUpper(kind) {
					best = max(best, agreement(r.Tokens, truth))
				}
				if len(r.Tokens) > 20 {
					said += fmt.Sprintf("; %s run of %d, stride %d, %.1f %% of the text", r.Type, len(r.Tokens), r.Stride, 100*agreement(r.Tokens, truth))
				}
			}
			t.Log(said)
			if best < 0.99 {
				t.Errorf("the best run has %.1f %% of the tokens", 100*best)
			}
		})
	}
}
