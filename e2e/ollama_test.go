package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Official clients, unchanged, get through the proxy what they get from a stock Ollama, in as many pieces.
func TestOllamaClients(t *testing.T) {
	o := newOllamas(t)
	stock := o.start(t, stockOllama)
	stock.createDemo(t)
	ask := func(url, key, program string) (text, pieces string, err error) {
		env := []string{"OLLAMA_HOST=" + url, "API_KEY=" + key, "OPENAI_BASE_URL=" + url + "/v1", "OPENAI_API_KEY=" + key, "MODEL=demo"}
		args := []string{filepath.Join(root, ".engine", program), prompts[4], "24"}
		if strings.HasPrefix(program, "ollama") {
			args = slices.Insert(args, 1, "demo")
		}
		return run(t, env, "node", args...)
	}
	want := stock.generate(t, prompts[1], 32)
	inEachMode(t, func(t *testing.T, mode string) {
		s := o.serve(t, "--mode", mode, "--api-key-file", oneKey(t))
		for _, program := range []string{"ollama-js/ollama.mjs", "openai/chat.mjs"} {
			text, pieces, err := ask(stock.url, "none", program)
			if err != nil || text == "" {
				t.Fatalf("stock, %s: %q %v\n%s (run `make openai-client ollama-client`)", program, text, err, pieces)
			}
			got, gotPieces, err := ask(s.url, "sk-alice-000", program)
			if err != nil || got != text || gotPieces != pieces {
				t.Errorf("%s: %q in %s pieces, %v\nstock: %q in %s pieces", program, got, gotPieces, err, text, pieces)
			}
			if _, errs, err := ask(s.url, "sk-wrong-000", program); err == nil || !strings.Contains(errs, "invalid or missing API key") {
				t.Errorf("%s with a wrong key: %v\n%s", program, err, errs)
			}
		}
		text, _ := json.Marshal(ollamaPrompt(prompts[1], 32))
		out, errs, err := run(t, nil, "curl", "-sSN", s.url+"/api/generate", "-H", "Authorization: Bearer sk-alice-000", "-d", string(text))
		got := ""
		for _, l := range readLines(t, strings.NewReader(out)) {
			got += l.Response
		}
		if err != nil || got != want {
			t.Errorf("curl: %q, stock %q\n%s %v", got, want, errs, err)
		}
	})
}

func oneKey(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(path, []byte("alice:sk-alice-000\nalice:sk-alice-111\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Answers have the headers and the bodies that they have without the proxy.
func TestOllamaAnswersAreItsOwn(t *testing.T) {
	o := newOllamas(t)
	stock := o.start(t, stockOllama, "OLLAMA_NO_CLOUD=1")
	stock.createDemo(t)
	shielded := o.serve(t)
	for target, body := range map[string]string{
		"HEAD /": "", "GET /": "", "GET /api/version": "", "HEAD /api/tags": "", "GET /api/tags": "", "GET /api/ps": "", "GET /api/status": "", "GET /v1/models": "", "GET /v1/models/demo": "",
		"GET /nowhere": "", "POST /api/tags": "", "OPTIONS /api/chat": "", "HEAD /api/blobs/sha256:" + strings.Repeat("0", 64): "",
		"POST /api/show": `{"model":"demo"}`, "POST /api/generate": `{"model":"absent"}`, "POST /api/chat": `{`, "DELETE /api/delete": `{"model":"absent"}`,
		"POST /api/copy": `{"source":"absent","destination":"b"}`, "POST /v1/chat/completions": `{"model":"absent"}`, "POST /v1/embeddings": `{}`,
	} {
		method, path, _ := strings.Cut(target, " ")
		var said [2]string
		for i, s := range []*server{stock, shielded} {
			r, _ := http.NewRequest(method, s.url+path, strings.NewReader(body))
			r.Header.Set("Origin", "http://localhost:3000")
			resp, err := s.client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			text, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			h := maps.Clone(resp.Header)
			h.Del("Date")
			said[i] = fmt.Sprint(resp.StatusCode, resp.ContentLength, resp.TransferEncoding, h, string(text))
		}
		if said[0] != said[1] {
			t.Errorf("%s\nstock:    %s\nshielded: %s", target, said[0], said[1])
		}
	}
}

// streamOllama begins an answer that has no end, and returns its first line and the rest.
func (s *server) streamOllama(t *testing.T, ctx context.Context) (line, io.ReadCloser) {
	t.Helper()
	body, _ := json.Marshal(ollamaPrompt(prompts[0], 1_000_000))
	r, _ := http.NewRequestWithContext(ctx, "POST", s.url+"/api/generate", bytes.NewReader(body))
	resp, err := s.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(resp.Body)
	text, err := in.ReadBytes('\n')
	var first line
	if err == nil {
		err = json.Unmarshal(text, &first)
	}
	if err != nil || first.Response == "" {
		t.Fatalf("%s %v\n%s", text, err, s.log)
	}
	return first, struct {
		io.Reader
		io.Closer
	}{in, resp.Body}
}

// The first line is there long before the last; a client that leaves ends its request, or the next one would not get its turn; and an enclave
// that dies ends an answer with an error.
func TestOllamaStreams(t *testing.T) {
	s := newOllamas(t).serve(t)
	s.createDemo(t)
	ctx, leave := context.WithCancel(t.Context())
	_, rest := s.streamOllama(t, ctx)
	leave()
	rest.Close()
	want := s.generate(t, prompts[0], 8)

	_, rest = s.streamOllama(t, t.Context())
	kill(t, s.child(t, "kvshield-enclave"))
	lines := readLines(t, rest)
	rest.Close()
	if last := lines[len(lines)-1]; !strings.Contains(last.Error, "the enclave process died") || last.Done {
		t.Errorf("the enclave died, and the answer ended with %+v", last)
	}
	for end := time.Now().Add(patience); !s.ollamaStatus(t).Health.Ready && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	if got := s.generate(t, prompts[0], 8); got != want {
		t.Errorf("%q after that, %q before", got, want)
	}
}

// A file of any size passes; other bodies are held to the limit, and refused in Ollama's words.
func TestOllamaLargeBodies(t *testing.T) {
	s := newOllamas(t).serve(t, "--max-body", "1MiB")
	digest := s.upload(t, bytes.Repeat([]byte("50 million bytes"), 50_000_000/16))
	resp, err := s.client.Head(s.url + "/api/blobs/" + digest)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("the file is not there: %v %v", resp, err)
	}
	request := ollamaPrompt(strings.Repeat("x", 2<<20), 1)
	for path, want := range map[string]string{"/api/generate": `{"error":"the request body is larger`, "/v1/completions": `{"error":{"message":"the request body is larger`} {
		if _, err := s.post(path, request); err == nil || !strings.Contains(err.Error(), "413") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestOllamaStatus(t *testing.T) {
	s := newOllamas(t).serve(t)
	s.createDemo(t)
	s.generate(t, prompts[0], 8)
	st := s.ollamaStatus(t)
	if st.Ollama.Generation != "embedded" || !strings.HasPrefix(st.Ollama.Version, "0.17") || st.Ollama.Installed != 1 || !st.Health.Ready || st.Keys != "none" {
		t.Errorf("%+v", st)
	}
	if l := st.Ollama.Loaded; len(l) != 1 || l[0].Name != "demo:latest" || st.Transitions.Shielded != 1 || st.Transitions.Count == 0 {
		t.Errorf("one model is loaded and shielded: %+v", st)
	}
	if a := st.Ollama.Answers; a.Count != 1 || a.Prompt == 0 || a.Generated != 8 {
		t.Errorf("one answer of 8 tokens: %+v", a)
	}
}

// What would send a conversation to another machine is refused.
func TestOllamaStaysHere(t *testing.T) {
	s := newOllamas(t).serve(t)
	if answer, err := s.post("/api/create", map[string]any{"model": "far", "from": "some:1b", "remote_host": "https://ollama.com"}); err != nil {
		t.Fatalf("%s %v", answer, err)
	}
	message := map[string]any{"model": "far", "messages": []any{map[string]any{"role": "user", "content": "x"}}}
	for path, want := range map[string]string{"/api/chat": "cloud is disabled", "/v1/chat/completions": "cloud is disabled", "/api/experimental/web_search": "--allow cloud"} {
		if answer, err := s.post(path, message); err == nil || !strings.Contains(err.Error(), "403") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %s %v", path, answer, err)
		}
	}
}

func TestOllamaKeys(t *testing.T) {
	o := newOllamas(t)
	s := o.serve(t, "--api-key-file", oneKey(t))
	for target, want := range map[string]int{"HEAD /": 200, "GET /": 200, "GET /api/tags": 401, "POST /api/generate": 401, "GET /v1/models/x.js": 401, "GET /kvshield/status": 401, "POST /api/blobs/sha256:0": 401} {
		method, path, _ := strings.Cut(target, " ")
		r, _ := http.NewRequest(method, s.url+path, nil)
		resp, err := s.client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s without a key: %d, want %d", target, resp.StatusCode, want)
		}
	}
	out, errs, err := run(t, o.env, kvshield, "serve", "--engine", embedded, "--listen", freeAddress(t), "--api-key-file", keyFile(t))
	if err == nil || !strings.Contains(errs, "cannot be kept apart in Ollama") {
		t.Errorf("keys of three tenants: %v %s %s", err, out, errs)
	}
	o.serve(t, "--api-key-file", keyFile(t), "--share-prefix")
}

// Ollama is started again when it dies, its runners do not outlive it, and nothing is left at the end.
func TestOllamaDies(t *testing.T) {
	s := newOllamas(t).serve(t)
	s.createDemo(t)
	want := s.generate(t, prompts[0], 8)
	ollama := s.child(t, "kvshield-ollama")
	runner := children(t, ollama)["kvshield-ollama"]
	kill(t, ollama)
	for end := time.Now().Add(patience); s.ollamaStatus(t).Health.Starts < 2; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("Ollama was not started again\n%s", s.log)
		}
	}
	if alive(runner) {
		t.Error("the runner of the Ollama that died is there still")
	}
	if got := s.generate(t, prompts[0], 8); got != want {
		t.Errorf("%q after that, %q before", got, want)
	}
	ollama = s.child(t, "kvshield-ollama")
	runner = children(t, ollama)["kvshield-ollama"]
	s.end(t)
	if alive(ollama) || alive(runner) {
		t.Error("something is left")
	}
}

// An Ollama that runs already is served when it is shielded, and only then.
func TestOllamaHost(t *testing.T) {
	o := newOllamas(t)
	refused := func(host, why string) {
		t.Helper()
		out, errs, err := run(t, o.env, kvshield, "serve", "--listen", freeAddress(t), "--ollama-host", host)
		if err == nil || !strings.Contains(errs, why) {
			t.Errorf("%s: %v %s %s; want %q", host, err, out, errs, why)
		}
	}
	refused(o.start(t, stockOllama, "OLLAMA_NO_CLOUD=1").url, "was not started under kvshield run")
	refused(o.start(t, embedded).url, "start it with OLLAMA_NO_CLOUD=1, or have that allowed with --allow cloud")

	shielded := o.start(t, embedded, "OLLAMA_NO_CLOUD=1")
	address := freeAddress(t)
	s := begin(t, address, append(o.env, "KVSHIELD_OLLAMA_HOST="+shielded.url), kvshield, "serve", "--listen", address)
	s.waitOllama(t)
	s.createDemo(t)
	s.generate(t, prompts[0], 8)
	if st := s.ollamaStatus(t); st.Ollama.Generation != "embedded" || st.Transitions.Count == 0 || st.Ollama.Answers.Generated != 8 {
		t.Errorf("%+v", st)
	}
	shielded.end(t)
	if _, err := s.post("/api/generate", ollamaPrompt(prompts[0], 8)); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("nobody is there: %v", err)
	}
}
