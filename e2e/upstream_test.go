package e2e

import (
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// An engine that runs under kvshield run is served; one that does not is refused, and so is one that took its place.
func TestServingAnEngineThatRunsAlready(t *testing.T) {
	address := freeAddress(t)
	_, port, _ := strings.Cut(address, ":")
	engineArgs := []string{engine("llama-server"), "-m", demoModel, "-t", "1", "--host", "127.0.0.1", "--port", port}
	start := func(name string, args ...string) *exec.Cmd {
		c := exec.Command(name, args...)
		c.Stderr = os.Stderr
		if !testing.Verbose() {
			c.Stderr = nil
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Process.Signal(syscall.SIGTERM); c.Wait() })
		client := httpClient(t)
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if r, err := client.Get("http://" + address + "/health"); err == nil {
				r.Body.Close()
				if r.StatusCode == http.StatusOK {
					return c
				}
			}
		}
		t.Fatal("the engine is not ready")
		return nil
	}
	plain := start(engineArgs[0], engineArgs[1:]...)
	out, err := exec.Command(kvshield, "serve", "--upstream", "http://"+address, "--listen", freeAddress(t)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "was not started under kvshield run") {
		t.Errorf("an engine in the clear was served: %v, %s", err, out)
	}
	_ = plain.Process.Signal(syscall.SIGTERM)
	plain.Wait()

	run := start(kvshield, append([]string{"run", "--"}, engineArgs...)...)
	front := freeAddress(t)
	log := &buffer{}
	serve := exec.Command(kvshield, "serve", "--upstream", "http://"+address, "--listen", front)
	serve.Stderr = log
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = serve.Process.Signal(syscall.SIGTERM); serve.Wait() })
	s := &server{url: "http://" + front, client: httpClient(t), log: log, ended: make(chan error, 1)}
	s.waitReady(t)
	if got := s.complete(t, prompts[0], 8, nil); got.Content == "" {
		t.Error("no answer")
	}
	r, err := s.client.Get(s.url + "/kvshield/status")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var status struct {
		Mode        string
		Health      struct{ Ready bool }
		Enclave     struct{ Backend string }
		Transitions struct{ Count int }
	}
	if err := json.NewDecoder(r.Body).Decode(&status); err != nil || status.Mode != "resident" || !status.Health.Ready || status.Enclave.Backend != "software" || status.Transitions.Count == 0 {
		t.Errorf("status: %+v, %v", status, err)
	}

	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		text := s.page(t, "/kvshield/metrics", "")
		booked, tokens := sampled(text, "kvshield_transitions_total", `kvshield_phase="unknown"`), sampled(text, "gen_ai_client_token_usage_sum", `gen_ai_token_type="output"`)
		if booked >= float64(status.Transitions.Count) && tokens == 8 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%v transitions and %v tokens were measured, the run counted %d", booked, tokens, status.Transitions.Count)
		}
	}

	_ = run.Process.Signal(syscall.SIGTERM)
	run.Wait()
	start(engineArgs[0], engineArgs[1:]...)
	if _, err := s.tryComplete(prompts[0], 4, nil); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("an engine in the clear took the place of the shielded one: %v", err)
	}
}
