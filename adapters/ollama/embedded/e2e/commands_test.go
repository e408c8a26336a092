package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// registry serves the demo model of this test's own store, as Ollama's registry does.
func registry(t *testing.T) string {
	t.Helper()
	models := filepath.Join(home, "models")
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v2/library/demo/manifests/latest", func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, filepath.Join(models, "manifests", "registry.ollama.ai", "library", "demo", "latest"))
	})
	mux.HandleFunc("GET /v2/library/demo/blobs/{digest}", func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, filepath.Join(models, "blobs", strings.Replace(r.PathValue("digest"), ":", "-", 1)))
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// Every command of Ollama's works, and says what it says without kvshield.
func TestCommands(t *testing.T) {
	from := registry(t) + "/library/demo"
	script := []string{"list", "show demo", "show --modelfile demo", "cp demo other", "run other Once", "ps", "stop other", "rm other", "show other", "run absent hello",
		"pull --insecure " + from, "run " + from + " Once", "rm " + from, "create --quantize q8_0 small -f " + filepath.Join(home, "demo.Modelfile"), "run small Once", "rm small", "--version", "help"}
	outputs := func(s *server) []string {
		var out []string
		for _, line := range script {
			text, err := s.command(strings.Fields(line)...)
			if err != nil {
				text = err.Error()[strings.Index(err.Error(), ":"):]
			}
			out = append(out, plainText(text))
		}
		return out
	}
	want := outputs(start(t, stock, "OLLAMA_NO_CLOUD=1"))
	inEachMode(t, func(t *testing.T, mode string) {
		got := outputs(startIn(t, mode, "OLLAMA_NO_CLOUD=1"))
		for i, line := range script {
			if got[i] != want[i] {
				t.Errorf("%s\nstock:    %s\nshielded: %s", line, want[i], got[i])
			}
		}
	})
}

// plainText leaves out what differs from run to run: progress, times, the program's name.
func plainText(text string) string {
	text = strings.NewReplacer("kvshield-ollama", "ollama", ", shielded by kvshield", "").Replace(text)
	var out []string
	for _, line := range strings.Split(text, "\n") {
		if i := strings.LastIndex(line, "\r"); i >= 0 {
			line = line[i+1:]
		}
		words := strings.Fields(line)
		if len(words) == 0 || strings.ContainsAny(line, "\x1b%") || strings.Contains(line, " ago") || strings.Contains(line, "from now") {
			continue
		}
		out = append(out, strings.Join(words, " "))
	}
	slices.Sort(out) // parameters come in any order
	return strings.Join(out, "\n")
}

// Ollama's own JavaScript client, unchanged, streams a chat with a system prompt.
func TestJavaScriptClient(t *testing.T) {
	program := filepath.Join(root, ".engine", "ollama-js", "ollama.mjs")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: run `make ollama-client`", err)
	}
	chat := func(s *server) string {
		t.Helper()
		cmd := exec.Command("node", program, "demo", "Fellow citizens of the Senate", "24")
		cmd.Env = environment(s.address, []string{"OLLAMA_HOST=http://" + s.address})
		var pieces strings.Builder
		cmd.Stderr = &pieces
		text, err := cmd.Output()
		if err != nil || len(text) == 0 {
			t.Fatalf("%q %v\n%s", text, err, pieces.String())
		}
		return fmt.Sprintf("%s in %s pieces", text, pieces.String())
	}
	want := chat(start(t, stock))
	inEachMode(t, func(t *testing.T, mode string) {
		if got := chat(startIn(t, mode)); got != want {
			t.Errorf("%s\nstock: %s", got, want)
		}
	})
}

// What Ollama says of a model, its size in memory included, is what it says without kvshield.
func TestModelsLookTheSame(t *testing.T) {
	about := func(s *server) string {
		s.generate(t, "qwen3", "In the war", object{"num_predict": 1})
		out := ""
		for _, path := range []string{"/api/tags", "/api/ps"} {
			resp, err := s.client.Get("http://" + s.address + path)
			if err != nil {
				t.Fatal(err)
			}
			var a struct{ Models []map[string]any }
			if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			slices.SortFunc(a.Models, func(x, y map[string]any) int { return strings.Compare(fmt.Sprint(x["name"]), fmt.Sprint(y["name"])) })
			for _, m := range a.Models {
				delete(m, "expires_at")
				delete(m, "modified_at")
			}
			out += fmt.Sprintf("%s %v\n", path, a.Models)
		}
		show, err := s.post("/api/show", object{"model": "qwen3"})
		if err != nil {
			t.Fatal(err)
		}
		var a map[string]any
		if err := json.Unmarshal([]byte(show), &a); err != nil {
			t.Fatal(err)
		}
		delete(a, "parameters") // in any order, and so in the next
		delete(a, "modelfile")
		return out + fmt.Sprint(a)
	}
	want := about(start(t, stock))
	inEachMode(t, func(t *testing.T, mode string) {
		if got := about(startIn(t, mode)); got != want {
			t.Errorf("%s\nstock: %s", got, want)
		}
	})
}

// Installed in the place of an Ollama, it looks for backends where that one does: in ../lib/ollama, and in the folders there.
func TestBackendsOfAnInstalledOllama(t *testing.T) {
	place, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	backends := filepath.Join(place, "lib", "ollama")
	device := filepath.Join(backends, "cuda_v13")
	for _, dir := range []string{filepath.Join(place, "bin"), device} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(device, "libggml-cuda.so"), []byte("no library"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{shielded, filepath.Join(filepath.Dir(shielded), "kvshield-enclave")} {
		text, err := os.ReadFile(program)
		if err == nil {
			err = os.WriteFile(filepath.Join(place, "bin", filepath.Base(program)), text, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s := start(t, filepath.Join(place, "bin", filepath.Base(shielded)), "OLLAMA_DEBUG=1")
	if want := fmt.Sprintf(`OLLAMA_LIBRARY_PATH="[%s %s]"`, backends, device); !strings.Contains(s.log.String(), want) {
		t.Errorf("the log does not say %s", want)
	}
	s.generate(t, "demo", "In the war", object{"num_predict": 4}) // what is no library does no harm
}
