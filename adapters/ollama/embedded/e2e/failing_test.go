package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A model that no mode can shield is refused, and the client is told why; so is one that only one mode can.
func TestRefusedModels(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode string) {
		for _, engine := range []string{"0", "1"} {
			s := startIn(t, mode, "OLLAMA_NEW_ENGINE="+engine)
			for _, path := range []string{"/api/generate", "/api/chat", "/v1/chat/completions"} {
				_, err := s.ask(path, object{"model": "recurrent", "prompt": "In the war", "messages": []object{{"role": "user", "content": "In the war"}}, "stream": false})
				if err == nil || !strings.Contains(err.Error(), "which no mode can shield") {
					t.Errorf("engine %s, %s: the client gets %v", engine, path, err)
				}
			}
			// What can be shielded still runs.
			s.generate(t, "demo", "In the war", object{"num_predict": 4})
		}
	})
}

// A model runs in the clear where its user says so, by its name, and nowhere else; that is said.
func TestAllowedModel(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode string) {
		for _, w := range []way{ways["llama.cpp"], ways["Ollama's engine"]} {
			s := startIn(t, mode, append([]string{"KVSHIELD_ALLOW_UNSHIELDED=other:7b,demo"}, w.env...)...)
			s.generate(t, "demo", w.prompts[0], object{"num_predict": 8})
			s.generate(t, "qwen3", w.prompts[0], object{"num_predict": 8})
			for _, line := range strings.Split(s.log.String(), "\n") {
				if strings.Contains(line, "IN THE CLEAR") && strings.Contains(line, "blobs/"+blob(t, "qwen3")) {
					t.Errorf("qwen3 is not on the list: %s", line)
				}
			}
			if want := "blobs/" + blob(t, "demo") + " runs IN THE CLEAR"; !strings.Contains(s.log.String(), want) {
				t.Errorf("nobody says %q", want)
			}
		}
	})
}

// blob is the name of the file in which Ollama keeps a model.
func blob(t *testing.T, model string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(home, "models", "manifests", "registry.ollama.ai", "library", model, "latest"))
	if err != nil {
		t.Fatal(err)
	}
	var m struct {
		Layers []struct{ MediaType, Digest string }
	}
	if err := json.Unmarshal(text, &m); err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		if strings.HasSuffix(l.MediaType, "image.model") {
			return strings.Replace(l.Digest, ":", "-", 1)
		}
	}
	t.Fatalf("%s has no model", model)
	return ""
}

// A context that the enclave has no room for: the client gets an error, and the server goes on.
func TestEnclaveTooSmall(t *testing.T) {
	for _, w := range []way{ways["llama.cpp"], ways["Ollama's engine"]} {
		s := startIn(t, "resident", append([]string{"KVSHIELD_ENCLAVE_MEMORY=1MiB"}, w.env...)...)
		_, err := s.ask("/api/generate", object{"model": "demo", "prompt": "In the war", "stream": false, "options": object{"num_ctx": 2048}})
		if err == nil || !strings.Contains(err.Error(), "--enclave-memory") {
			t.Errorf("the client gets %v", err)
		}
		s.generate(t, "demo", "In the war", object{"num_ctx": 256, "num_predict": 4})
	}
}

// stream asks for a long answer and hands it over piece by piece; a failure is its end.
func (s *server) stream(t *testing.T, model, prompt string) (pieces chan string, end chan error) {
	t.Helper()
	body := fmt.Sprintf(`{"model":%q,"prompt":%q,"options":{"num_predict":50000}}`, model, prompt)
	resp, err := s.client.Post("http://"+s.address+"/api/generate", "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	pieces, end = make(chan string, 10000), make(chan error, 1)
	go func() {
		defer resp.Body.Close()
		defer close(pieces)
		lines := bufio.NewScanner(resp.Body)
		for lines.Scan() {
			var a struct {
				Response, Error string
				Done            bool
			}
			if err := json.Unmarshal(lines.Bytes(), &a); err != nil || a.Error != "" || a.Done {
				end <- fmt.Errorf("%s%v", a.Error, err)
				return
			}
			pieces <- a.Response
		}
		end <- fmt.Errorf("the answer ended: %v", lines.Err())
	}()
	return pieces, end
}

// children of a process, by their programs' names.
func children(t *testing.T, pid int) map[string][]int {
	t.Helper()
	out := map[string][]int{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		open, end := strings.IndexByte(string(text), '('), strings.LastIndexByte(string(text), ')')
		fields := strings.Fields(string(text[end+1:]))
		if parent, _ := strconv.Atoi(fields[1]); parent != pid || fields[0] == "Z" {
			continue
		}
		child, _ := strconv.Atoi(strings.TrimSpace(string(text[:open])))
		name := string(text[open+1 : end])
		out[name] = append(out[name], child)
	}
	return out
}

const enclaveName = "kvshield-enclav" // as much of it as the kernel keeps

func (s *server) enclave(t *testing.T) int {
	t.Helper()
	pids := children(t, s.cmd.Process.Pid)[enclaveName]
	if len(pids) != 1 {
		t.Fatalf("enclave processes %v, want one\n%s", pids, s.log)
	}
	return pids[0]
}

// The enclave is killed while two models answer, one by each engine: what the clients got is the beginning of the right text, then
// an error that says why; the next requests are answered.
func TestEnclaveKilledUnderTwoModels(t *testing.T) {
	// After these prompts a model does not repeat one token, upon which Ollama ends an answer without a word.
	models := []struct{ model, prompt string }{{"demo", "Under the land"}, {"qwen3", "Under the house"}}
	plain := start(t, stock)
	var want []string
	for _, w := range models {
		want = append(want, plain.generate(t, w.model, w.prompt, object{"num_predict": tokens}))
	}
	inEachMode(t, func(t *testing.T, mode string) {
		s := startIn(t, mode)
		enclave := s.enclave(t)
		for _, w := range models { // loaded before either answers: the demo model answers fast
			s.generate(t, w.model, w.prompt, object{"num_predict": 1})
		}
		var got [2]string
		var ends [2]chan error
		var streams [2]chan string
		for i, w := range models {
			streams[i], ends[i] = s.stream(t, w.model, w.prompt)
			got[i] = <-streams[i] + <-streams[i]
		}
		if err := syscall.Kill(enclave, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for i, w := range models {
			for piece := range streams[i] {
				got[i] += piece
			}
			// Beyond the tokens that were compared, the two best may be so close that either is right.
			if n := min(len(got[i]), len(want[i])); got[i][:n] != want[i][:n] {
				t.Errorf("%s: the client got wrong text: %q, want %q", w.model, got[i], want[i])
			}
			if err := <-ends[i]; !strings.Contains(err.Error(), "the enclave process died") {
				t.Errorf("%s: the client's stream ends with %v", w.model, err)
			}
		}
		for i, w := range models {
			if text := s.generate(t, w.model, w.prompt, object{"num_predict": tokens}); text != want[i] {
				t.Errorf("%s: afterwards %q, want %q", w.model, text, want[i])
			}
		}
		if s.enclave(t) == enclave {
			t.Error("the enclave is the same process")
		}
	})
}

// One enclave serves all models and outlives their runners; a server that ends leaves nothing, however it ends.
func TestOneEnclaveAndNothingLeftBehind(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode string) {
		for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			s := startIn(t, mode)
			enclave := s.enclave(t)
			for _, model := range []string{"demo", "qwen3", "gemma3"} {
				s.generate(t, model, "In the war", object{"num_predict": 4})
			}
			runners := children(t, s.cmd.Process.Pid)["kvshield-ollama"]
			if s.enclave(t) != enclave || len(runners) != 3 {
				t.Errorf("enclave %d became %d, runners %v", enclave, s.enclave(t), runners)
			}
			s.unload(t, "demo")
			eventually(t, func() string {
				if now := children(t, s.cmd.Process.Pid); len(now["kvshield-ollama"]) != 2 || s.enclave(t) != enclave {
					return fmt.Sprintf("after an unload: %v", now)
				}
				return ""
			})
			if err := s.cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			<-s.ended
			eventually(t, func() string {
				for _, pid := range append(runners, enclave) {
					if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(text), ") Z ") {
						return fmt.Sprintf("%v: process %d is left: %s", signal, pid, text)
					}
				}
				dirs, _ := filepath.Glob(filepath.Join(home, "kvshield-*"))
				return strings.Join(dirs, " ")
			})
		}
	})
}

func eventually(t *testing.T, wrong func() string) {
	t.Helper()
	var what string
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if what = wrong(); what == "" {
			return
		}
	}
	t.Error(what)
}

// Settings that nobody can mean are refused before anything is started, and help starts nothing.
func TestSettings(t *testing.T) {
	for _, test := range []struct {
		env, args string
		code      int
		says      string
	}{
		{"KVSHIELD_MODE=permuted", "serve", 2, `Error: there is no mode "permuted"; use --mode resident, permute, off`},
		{"KVSHIELD_ENCLAVE_MEMORY=much", "serve", 2, "--enclave-memory much: it takes auto or a size"},
		{"", "serve --mode none", 2, `there is no mode "none"`},
		{"KVSHIELD_ENCLAVE=/no/such", "serve", 1, "/no/such"},
		{"", "serve --help", 0, "--allow-unshielded"},
		{"", "runner --model x", 1, "error: a runner of kvshield-ollama is started by `kvshield-ollama serve` alone"},
		{"", "runner --mlx-engine --model x", 1, "is started by"},
		{"", "nonsense", 1, `Error: unknown command "nonsense" for "ollama"`},
	} {
		cmd := exec.Command(shielded, strings.Fields(test.args)...)
		cmd.Env = environment("127.0.0.1:1", []string{test.env})
		out, _ := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != test.code || !strings.Contains(string(out), test.says) {
			t.Errorf("%s kvshield-ollama %s: exit code %d\n%s", test.env, test.args, code, out)
		}
	}
}

// Mode off is stock Ollama, and says that nothing is shielded.
func TestModeOff(t *testing.T) {
	s := startIn(t, "off")
	if text := s.generate(t, "demo", "In the war", object{"num_predict": 4}); text == "" {
		t.Error("no text")
	}
	if now := children(t, s.cmd.Process.Pid); len(now[enclaveName]) != 0 || !strings.Contains(s.log.String(), "mode off: the KV cache is in clear") {
		t.Errorf("%v\n%s", now, s.log)
	}
}
