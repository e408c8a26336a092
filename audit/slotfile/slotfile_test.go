package slotfile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/llamacpp"
)

const model = "../../examples/model/demo.gguf"

var demo = Shape{Layers: 5, HeadsKV: 2}

// saved is a slot file of a real engine, after a short prompt.
func saved(t testing.TB, args ...string) (file []byte, tokens []int32) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "kvs-slot-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: "../../.engine/bin/llama-server", Model: model, Socket: filepath.Join(dir, "s.sock"), Env: os.Environ(),
		Args: append([]string{"-np", "1", "-c", "512", "-t", "1", "--slot-save-path", dir + "/"}, args...)})
	if err != nil {
		t.Fatalf("%v; run make engine", err)
	}
	t.Cleanup(s.Stop)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.WaitHealthy(ctx); err != nil {
		t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Dial(ctx) }}}
	post := func(path string, request map[string]any, answer any) {
		body, _ := json.Marshal(request)
		resp, err := client.Post("http://engine"+path, "application/json", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if err := json.NewDecoder(resp.Body).Decode(answer); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatal(path, resp.Status, err)
		}
	}
	var said struct{ Tokens []int32 }
	post("/tokenize", map[string]any{"content": "The sea was calm and the sky was clear.", "add_special": true}, &said)
	post("/completion", map[string]any{"prompt": said.Tokens, "n_predict": 0, "id_slot": 0, "cache_prompt": true}, &struct{}{})
	post("/slots/0?action=save", map[string]any{"filename": "slot.bin"}, &struct{}{})
	file, err = os.ReadFile(filepath.Join(dir, "slot.bin"))
	if err != nil {
		t.Fatal(err)
	}
	return file, said.Tokens
}

func TestRealFiles(t *testing.T) {
	reference, tokens := saved(t, "-fa", "on", "-ctk", "f32", "-ctv", "f32")
	want, err := Parse(reference, demo)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		k, v, fa string
		within   float64
	}{
		{"f32", "f32", "on", 0}, {"f16", "f16", "on", 1e-3}, {"f16", "f16", "off", 2e-3}, {"f32", "f16", "off", 2e-3},
		{"bf16", "bf16", "on", 8e-3}, {"q8_0", "q8_0", "on", 2e-2}, {"q8_0", "f16", "off", 2e-2},
	} {
		t.Run(fmt.Sprintf("%s %s fa %s", c.k, c.v, c.fa), func(t *testing.T) {
			b, _ := saved(t, "-fa", c.fa, "-ctk", c.k, "-ctv", c.v)
			f, err := Parse(b, demo)
			if err != nil {
				t.Fatal(err)
			}
			if len(f.Tokens) < len(tokens) || !slices.Equal(f.Tokens[:len(tokens)], tokens) {
				t.Errorf("tokens %v, said %v", f.Tokens, tokens)
			}
			for l := range want.Snapshot.Layers {
				a, b := want.Snapshot.Layers[l], f.Snapshot.Layers[l]
				if d := away(a.K.Data, b.K.Data); d > c.within {
					t.Errorf("layer %d: keys are %.4f away", l, d)
				}
				if d := away(a.V.Data, b.V.Data); d > c.within {
					t.Errorf("layer %d: values are %.4f away", l, d)
				}
			}
			for i, p := range f.Snapshot.Positions {
				if int(p) != i {
					t.Fatalf("row %d has position %d", i, p)
				}
			}
		})
	}
}

func away(a, b []float32) float64 {
	if len(a) != len(b) {
		return math.Inf(1)
	}
	var d, size float64
	for i := range a {
		d += float64(a[i]-b[i]) * float64(a[i]-b[i])
		size += float64(a[i]) * float64(a[i])
	}
	return math.Sqrt(d / size)
}

func TestDamagedFiles(t *testing.T) {
	whole, _ := saved(t)
	for n := range len(whole) {
		if _, err := Parse(whole[:n], demo); err == nil {
			t.Fatalf("the first %d of %d bytes were taken for a whole file", n, len(whole))
		}
	}
	with := func(at int, b ...byte) []byte {
		c := slices.Clone(whole)
		copy(c[at:], b)
		return c
	}
	other, err := os.ReadFile(model)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		b     []byte
		shape Shape
		want  error
	}{
		{"empty", nil, demo, ErrNotSlotFile},
		{"text", []byte("hello, this is no slot file"), demo, ErrNotSlotFile},
		{"a model", other, demo, ErrNotSlotFile},
		{"another version", with(4, 9), demo, ErrUnsupported},
		{"too many tokens", with(8, 255, 255, 255, 255), demo, ErrTruncated},
		{"more tokens than words", with(0x14, 255, 255), demo, ErrMalformed},
		{"something behind", append(slices.Clone(whole), 1, 2, 3), demo, ErrUnsupported},
		{"half of it", whole[:len(whole)/2], demo, ErrTruncated},
		{"another model's layers", whole, Shape{4, 2}, ErrUnsupported},
		{"heads that do not divide", whole, Shape{5, 3}, ErrMalformed},
		{"no heads", whole, Shape{5, 0}, ErrUnsupported},
	} {
		if _, err := Parse(c.b, c.shape); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, args := range [][]string{{"-fa", "on"}, {"-fa", "off"}, {"-ctk", "q8_0", "-ctv", "q8_0"}} {
		b, _ := saved(f, args...)
		if len(b) == 0 {
			f.Fatal("an empty seed")
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := Parse(b, demo)
		if err == nil && file.Snapshot.Check() != nil {
			t.Error("a snapshot that does not hold together was parsed")
		}
	})
}
