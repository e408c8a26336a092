package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/ollama/ollama/envconfig"
)

// What Address reads is what Ollama reads, and what it does not take is nothing that a client on this machine could use.
func TestAddressIsOllamas(t *testing.T) {
	for _, text := range []string{"", "127.0.0.1", "127.0.0.1:11435", ":1234", "http://127.0.0.1", "http://127.0.0.1:9", "http://127.0.0.1:9/", "[::1]:77", "::1", " 127.0.0.1:5 ", "127.0.0.2:8"} {
		t.Setenv("OLLAMA_HOST", text)
		host, port, err := net.SplitHostPort(envconfig.Host().Host)
		if err != nil {
			t.Fatal(err)
		}
		if host == "" {
			host = "127.0.0.1"
		}
		if got, err := Address(text); err != nil || got != net.JoinHostPort(host, port) {
			t.Errorf("%q: %s, %v; Ollama takes %s:%s", text, got, err, host, port)
		}
	}
	for text, want := range map[string]string{"0.0.0.0": "127.0.0.1:11434", "0.0.0.0:80": "127.0.0.1:80", "[::]:5": "127.0.0.1:5", "localhost:7": "127.0.0.1:7", "localhost": "127.0.0.1:11434"} {
		if got, err := Address(text); err != nil || got != want {
			t.Errorf("%q: %s, %v; want %s", text, got, err, want)
		}
	}
}

func TestAddressRefuses(t *testing.T) {
	for text, want := range map[string]error{
		"https://127.0.0.1": ErrForm, "127.0.0.1:x": ErrForm, "127.0.0.1:0": ErrForm, "127.0.0.1:65536": ErrForm, "http://127.0.0.1/v1": ErrForm, "ftp://127.0.0.1": ErrForm,
		"ollama.com": ErrRemote, "10.0.0.1": ErrRemote, "[2001:db8::1]:4": ErrRemote, "a b": ErrRemote,
	} {
		if got, err := Address(text); !errors.Is(err, want) {
			t.Errorf("%q: %q, %v; want %v", text, got, err, want)
		}
	}
}

const last = `{"model":"m","created_at":"2026-01-01T00:00:00Z","response":"","done":true,"context":[1,2],"total_duration":7000,"load_duration":1,"prompt_eval_count":3,"prompt_eval_duration":2,"eval_count":5,"eval_duration":4}`

// The figures are found wherever the body was cut into pieces.
func TestFiguresOfAnAnswer(t *testing.T) {
	stream := `{"model":"m","response":"a","done":false}` + "\n" + `{"model":"m","response":"b\n","done":false}` + "\n" + last + "\n"
	for _, body := range []string{stream, last, strings.Repeat(" ", maxLine+1) + "\n" + stream} {
		for _, size := range []int{1, 7, 64, len(body)} {
			var a Answer
			for rest := body; rest != ""; {
				n := min(size, len(rest))
				fmt.Fprint(&a, rest[:n])
				rest = rest[n:]
			}
			f, ok := a.Figures()
			if !ok || f.Model != "m" || f.PromptEvalCount != 3 || f.EvalCount != 5 || f.TotalDuration != 7*time.Microsecond {
				t.Errorf("%d bytes in pieces of %d: %+v, %v", len(body), size, f, ok)
			}
		}
	}
}

func TestNoFiguresOfACutAnswer(t *testing.T) {
	for name, body := range map[string]string{
		"empty": "", "cut": `{"model":"m","response":"a","done":false}` + "\n" + last[:40], "error": `{"error":"the engine stopped"}` + "\n",
		"unfinished": `{"model":"m","response":"a","done":false}` + "\n", "too long": strings.Repeat(" ", maxLine) + last,
	} {
		var a Answer
		fmt.Fprint(&a, body)
		if f, ok := a.Figures(); ok {
			t.Errorf("%s: %+v", name, f)
		}
	}
}

// Local believes only a server that says so; what real ones say is in package e2e.
func TestLocal(t *testing.T) {
	for body, want := range map[string]string{
		`{}`:  ErrCloud.Error(),
		"404": "does not say",
		"500": "something went wrong",
	} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.URL.Path != "/api/status" || body == "404":
				w.WriteHeader(http.StatusNotFound)
			case body == "500":
				w.WriteHeader(http.StatusInternalServerError)
			default:
				fmt.Fprint(w, body)
			}
		}))
		address := s.Listener.Addr().String()
		err := New(dialer(address)).Local(t.Context())
		s.Close()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", body, err, want)
		}
	}
}

func dialer(address string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", address) }
}

// Whoever imports the rest of kvshield does not get Ollama.
func TestOnlyTheCommandGetsOllama(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", "{{.ImportPath}} {{join .Deps \" \"}}", "github.com/kvshield/kvshield/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	const module = "github.com/kvshield/kvshield/"
	got := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		path, deps, _ := strings.Cut(line, " ")
		if strings.Contains(deps, "github.com/ollama/ollama/") {
			got[strings.TrimPrefix(path, module)] = true
		}
	}
	for _, path := range []string{"adapters/ollama/client", "adapters/ollama/server", "cmd/kvshield"} {
		if !got[path] {
			t.Errorf("%s is expected to use it", path)
		}
		delete(got, path)
	}
	if len(got) > 0 {
		t.Errorf("these use it too: %v", got)
	}
}
