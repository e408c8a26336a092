package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// processes lists the processes whose command line contains text, by process number.
func processes(text string) map[int]string {
	found := map[int]string{}
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		b, err := os.ReadFile(path)
		line := strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
		if err == nil && strings.Contains(line, text) {
			pid, _ := strconv.Atoi(strings.Split(path, "/")[2])
			found[pid] = line
		}
	}
	return found
}

// children lists the processes that a process started, by the name of their program.
func children(t *testing.T, pid int) map[string]int {
	t.Helper()
	found := map[string]int{}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, path := range tasks {
		b, _ := os.ReadFile(path)
		for _, field := range strings.Fields(string(b)) {
			child, _ := strconv.Atoi(field)
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", child)); err == nil {
				found[filepath.Base(exe)] = child
			}
		}
	}
	return found
}

func (s *server) child(t *testing.T, program string) int {
	t.Helper()
	pid := children(t, s.cmd.Process.Pid)[program]
	if pid == 0 {
		t.Fatalf("kvshield has no child %s: %v", program, children(t, s.cmd.Process.Pid))
	}
	return pid
}

// stream asks for a long answer and returns what arrived, as the client saw it.
func (s *server) stream(t *testing.T) (lines chan string) {
	t.Helper()
	resp, err := s.client.Post(s.url+"/completion", "application/json", strings.NewReader(
		`{"prompt":"`+prompts[0]+`","n_predict":1900,"temperature":0,"ignore_eos":true,"stream":true,"cache_prompt":false}`))
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
	lines = make(chan string, 10000)
	go func() {
		defer resp.Body.Close()
		defer close(lines)
		for scan := bufio.NewScanner(resp.Body); scan.Scan(); {
			lines <- scan.Text()
		}
	}()
	return lines
}

// take reads n lines of a stream.
func take(t *testing.T, lines chan string, n int) []string {
	t.Helper()
	var got []string
	for len(got) < n {
		select {
		case line, ok := <-lines:
			if !ok {
				return got
			}
			got = append(got, line)
		case <-time.After(patience):
			t.Fatalf("the stream stands still after %d lines", len(got))
		}
	}
	return got
}

// said is the text of a stream's events.
func said(lines []string) string {
	var text strings.Builder
	for _, line := range lines {
		if _, rest, ok := strings.Cut(line, `"content":"`); ok {
			part, _, _ := strings.Cut(rest, `","`)
			text.WriteString(part)
		}
	}
	return text.String()
}

// beginsRight compares what a client got with the beginning of the stock text. Beyond the tokens whose near ties are known either
// may be right.
func beginsRight(t *testing.T, beginning, text string) {
	t.Helper()
	if n := min(len(beginning), len(text)); text == "" || text[:n] != beginning[:n] {
		t.Errorf("after the failure the client got wrong text, or none:\n%q", text)
	}
}

// What a client sees when the enclave dies or freezes in the middle of its answer: the right text up to there, then an error,
// and soon afterwards a server that answers again.
func TestEnclaveFailsInMidAnswer(t *testing.T) { inEachMode(t, enclaveFailsInMidAnswer) }

func enclaveFailsInMidAnswer(t *testing.T, mode string) {
	t.Parallel() // it mostly waits for a timeout
	for name, signal := range map[string]syscall.Signal{"killed": syscall.SIGKILL, "frozen": syscall.SIGSTOP} {
		t.Run(name, func(t *testing.T) {
			s := startShielded(t, serveOptions{model: demoModel, mode: mode, flags: []string{"--enclave-timeout", "1s"}, args: []string{"-c", "2048", "-np", "1"}})
			stock := startStock(t, demoModel, nil, "-c", "2048", "-np", "1")
			beginning := said(take(t, stock.stream(t), 2*tokens))
			enclave := s.child(t, "kvshield-enclave")
			stream := s.stream(t)
			before := take(t, stream, 20)
			if err := syscall.Kill(enclave, signal); err != nil {
				t.Fatal(err)
			}
			all := append(before, take(t, stream, 10000)...)
			beginsRight(t, beginning, said(all))
			if end := strings.Join(all[max(0, len(all)-3):], "\n"); !strings.Contains(end, `"error"`) || strings.Contains(end, "[DONE]") {
				t.Errorf("the stream ends with %q, want an error event", end)
			}
			s.waitReady(t)
			if got, want := s.complete(t, prompts[1], 50, nil), stock.complete(t, prompts[1], 50, nil); got.Content != want.Content {
				t.Errorf("after the restart:\n%q\nwant\n%q", got.Content, want.Content)
			}
			if again := s.child(t, "kvshield-enclave"); again == enclave {
				t.Error("the enclave is the one that failed")
			}
		})
	}
}

func TestEngineKilledIsStartedAgain(t *testing.T) { inEachMode(t, engineKilledIsStartedAgain) }

func engineKilledIsStartedAgain(t *testing.T, mode string) {
	s := startShielded(t, serveOptions{model: demoModel, mode: mode})
	engine := s.child(t, "llama-server")
	stream := s.stream(t)
	take(t, stream, 10)
	_ = syscall.Kill(engine, syscall.SIGKILL)
	rest := take(t, stream, 10000)
	if end := strings.Join(rest, "\n"); !strings.Contains(end, `"error"`) {
		t.Errorf("the stream ends without an error: %q", end)
	}
	resp, err := s.client.Get(s.url + "/health")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK && (resp.StatusCode/100 != 5 || !strings.Contains(string(body), "send the request again")) {
		t.Errorf("while it restarts: %s %s", resp.Status, body)
	}
	s.waitReady(t)
	s.complete(t, prompts[0], 5, nil)
}

// runtimeDirs of kvshield that exist.
func runtimeDirs() map[string]bool {
	found := map[string]bool{}
	for _, base := range []string{os.Getenv("XDG_RUNTIME_DIR"), os.TempDir()} {
		dirs, _ := filepath.Glob(filepath.Join(base, "kvshield-*"))
		for _, dir := range dirs {
			found[dir] = true
		}
	}
	return found
}

// eventually waits until done returns an empty description of what is left.
func eventually(t *testing.T, left func() string) {
	t.Helper()
	what := left()
	for end := time.Now().Add(20 * time.Second); what != ""; what = left() {
		if time.Now().After(end) {
			t.Fatalf("left behind: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestNothingIsLeftBehind(t *testing.T) { inEachMode(t, nothingIsLeftBehind) }

func nothingIsLeftBehind(t *testing.T, mode string) {
	for name, signal := range map[string]syscall.Signal{"killed": syscall.SIGKILL, "terminated": syscall.SIGTERM, "interrupted": syscall.SIGINT} {
		t.Run(name, func(t *testing.T) {
			before := runtimeDirs()
			s := startShielded(t, serveOptions{model: demoModel, mode: mode})
			s.complete(t, prompts[0], 5, nil)
			pids := []int{s.child(t, "kvshield-enclave"), s.child(t, "llama-server")}
			dir := ""
			for d := range runtimeDirs() {
				if !before[d] {
					dir = d
				}
			}
			if dir == "" {
				t.Fatal("no runtime directory was made")
			}
			_ = s.cmd.Process.Signal(signal)
			s.wait(t)
			eventually(t, func() string {
				for _, pid := range pids {
					if state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(state), ") Z ") {
						return string(state)
					}
				}
				if _, err := os.Stat(dir); err == nil {
					return dir
				}
				return ""
			})
		})
	}
}

// When the session socket is gone the engine cannot say hello, so it must not run.
func TestSessionSocketGone(t *testing.T) { inEachMode(t, sessionSocketGone) }

func sessionSocketGone(t *testing.T, mode string) {
	before := runtimeDirs()
	s := startShielded(t, serveOptions{model: demoModel, mode: mode})
	for dir := range runtimeDirs() {
		if !before[dir] {
			os.Remove(filepath.Join(dir, "session.sock"))
		}
	}
	_ = syscall.Kill(s.child(t, "llama-server"), syscall.SIGKILL)
	time.Sleep(time.Second)
	if c, err := s.tryComplete(prompts[0], 5, nil); err == nil {
		t.Errorf("an engine without a session answered %q", c.Content)
	}
}

// The shielded model's frequency factors are right for the model's own rotary embedding only.
func TestAnotherRotaryEmbeddingIsRefused(t *testing.T) {
	for _, flags := range [][]string{{"--rope-freq-base", "20000"}, {"--rope-scaling", "yarn", "--rope-scale", "4"}} {
		out, errs, err := run(t, nil, kvshield, append([]string{"run", "--mode", "permute", "--", "llama-completion", "-m", demoModel, "-no-cnv", "--no-display-prompt",
			"-n", "20", "-p", prompts[0]}, flags...)...)
		if err == nil || strings.TrimSpace(out) != "" || !strings.Contains(errs, "another rotary embedding than its model's own") {
			t.Errorf("%v: error %v, printed %q\n%s", flags, err, out, errs)
		}
	}
}
