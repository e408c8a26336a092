package e2e

import (
	"bytes"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The official client, unchanged, gets from the proxy what it gets from the stock engine, in as many pieces.
func TestOpenAIClient(t *testing.T) {
	program := filepath.Join(root, ".engine", "openai", "chat.mjs")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: run `make openai-client`", err)
	}
	address := freeAddress(t)
	_, port, _ := strings.Cut(address, ":")
	stock := exec.Command(engine("llama-server"), "-m", demoModel, "-t", "1", "--host", "127.0.0.1", "--port", port)
	if err := stock.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stock.Process.Kill(); stock.Wait() })
	(&server{url: "http://" + address, client: httpClient(t), log: &buffer{}, ended: make(chan error, 1)}).waitReady(t)
	shielded := startShielded(t, serveOptions{model: demoModel, flags: []string{"--api-key-file", keyFile(t)}})
	chat := func(url, key string) (string, string, error) {
		// After this message the two best tokens are furthest apart of all prompts: 0.06 in log-probability.
		return run(t, []string{"OPENAI_BASE_URL=" + url + "/v1", "OPENAI_API_KEY=" + key}, "node", program, prompts[7], "24")
	}
	want, pieces, err := chat("http://"+address, "none")
	if err != nil || want == "" {
		t.Fatalf("stock: %q %v\n%s", want, err, pieces)
	}
	got, gotPieces, err := chat(shielded.url, "sk-alice-000")
	if err != nil || got != want || gotPieces != pieces {
		t.Errorf("shielded: %q in %s pieces, %v\nstock: %q in %s pieces", got, gotPieces, err, want, pieces)
	}
	if _, errs, err := chat(shielded.url, "sk-wrong-000"); err == nil || !strings.Contains(errs, "401") {
		t.Errorf("a wrong key: %v\n%s", err, errs)
	}
}

// curl accepts the certificate that was made for the run, by its public key alone.
func TestCurlOverTLS(t *testing.T) {
	s := launch(t, serveOptions{model: demoModel, flags: []string{"--tls-generate"}})
	s.client.Transport = insecure(t)
	s.url = strings.Replace(s.url, "http:", "https:", 1)
	s.waitReady(t)
	out, errs, err := run(t, nil, "curl", "-sSk", s.url+"/completion", "-d", `{"prompt":"At last","n_predict":4}`)
	if err != nil || !strings.Contains(out, `"content"`) {
		t.Errorf("%s %s %v", out, errs, err)
	}
	if !strings.Contains(s.log.String(), "SHA-256 ") {
		t.Errorf("no fingerprint: %s", s.log)
	}
}

// Answers have the headers and the bodies that they have without the proxy.
func TestAnswersAreThoseOfTheEngine(t *testing.T) {
	stock := startStock(t, demoModel, nil)
	shielded := startShielded(t, serveOptions{model: demoModel})
	for target, body := range map[string]string{
		"GET /health": "", "GET /nowhere": "", "GET /lora-adapters": "", "OPTIONS /v1/completions": "",
		"POST /tokenize":    `{"content":"The sea"}`,
		"POST /detokenize":  `{"tokens":[1,2,3]}`,
		"POST /embedding":   `{"content":"x"}`,
		"POST /completion":  `{`,
		"POST /v1/messages": `{"max_tokens":1}`,
	} {
		method, path, _ := strings.Cut(target, " ")
		var heads [2]http.Header
		var bodies [2][]byte
		var codes [2]int
		for i, s := range []*server{stock, shielded} {
			r, _ := http.NewRequest(method, s.url+path, strings.NewReader(body))
			r.Header.Set("Origin", "http://page.example")
			resp, err := s.client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			bodies[i], _ = io.ReadAll(resp.Body)
			resp.Body.Close()
			heads[i], codes[i] = resp.Header, resp.StatusCode
			for _, hop := range []string{"Date", "Connection", "Keep-Alive"} {
				heads[i].Del(hop)
			}
		}
		if codes[0] != codes[1] || !maps.EqualFunc(heads[0], heads[1], slices.Equal) || !bytes.Equal(bodies[0], bodies[1]) {
			t.Errorf("%s\nstock:    %d %v %s\nshielded: %d %v %s", target, codes[0], heads[0], bodies[0], codes[1], heads[1], bodies[1])
		}
	}
}
