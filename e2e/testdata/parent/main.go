// Command parent starts llama-server as Ollama's server does: the same arguments, environment, pipes and signals, and the same
// probes first. Tests tell it what to do on standard input, a line for each: `load NAME MODEL [ARGUMENTS]`, `signal NAME
// term|kill`, `wait NAME`. It answers with a line of JSON.
//
// Usage: parent LLAMA-SERVER
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// answer to a line of standard input.
type answer struct {
	OK    bool   `json:"ok"`
	PID   int    `json:"pid"`
	Port  int    `json:"port"`
	Error string `json:"error"`
}

// runner is one llama-server.
type runner struct {
	cmd  *exec.Cmd
	port int
	log  log
	done chan struct{}
}

// log keeps the lines that Ollama would show to its client.
type log struct {
	mu     sync.Mutex
	part   []byte
	errors []string
}

// shown are beginnings of an error in a line of llama-server's, among those that Ollama looks for.
var shown = []string{"error:", "error loading model", "llama_init_from_model:"}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range bytes.SplitAfter(b, []byte("\n")) {
		l.part = append(l.part, line...)
		if !bytes.HasSuffix(l.part, []byte("\n")) {
			continue
		}
		for _, mark := range shown {
			if i := bytes.Index(l.part, []byte(mark)); i >= 0 {
				l.errors = append(l.errors, strings.TrimSpace(string(l.part[i:])))
				break
			}
		}
		l.part = l.part[:0]
	}
	return os.Stderr.Write(b)
}

func (l *log) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.errors, "\n")
}

var (
	program string
	runners = map[string]*runner{}
)

func main() {
	program = os.Args[1]
	reply(probe())
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		words := strings.Fields(lines.Text())
		switch words[0] {
		case "load":
			reply(load(words[1], words[2], words[3:]))
		case "signal":
			signal := map[string]syscall.Signal{"term": syscall.SIGTERM, "kill": syscall.SIGKILL}[words[2]]
			reply(answer{OK: runners[words[1]].cmd.Process.Signal(signal) == nil})
		case "wait":
			<-runners[words[1]].done
			reply(answer{OK: true, Error: runners[words[1]].log.text()})
		}
	}
	for _, r := range runners {
		_ = r.cmd.Process.Kill()
		<-r.done
	}
}

func reply(a answer) {
	text, _ := json.Marshal(a)
	fmt.Println(string(text))
}

func environment() []string {
	library := filepath.Dir(program)
	if old := os.Getenv("LD_LIBRARY_PATH"); old != "" {
		library += ":" + old
	}
	env := []string{"LD_LIBRARY_PATH=" + library, "LLAMA_MEDIA_MARKER=<__media__>"}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "LD_LIBRARY_PATH=") {
			env = append(env, e)
		}
	}
	return env
}

// probe looks for devices: a server without a model, killed as soon as it has said what it sees, and a list.
func probe() answer {
	server := exec.Command(program, "--port", fmt.Sprint(freePort()), "--host", "127.0.0.1", "--no-webui", "--offline", "--verbose")
	server.Env = environment()
	pipe, err := server.StderrPipe()
	if err == nil {
		err = server.Start()
	}
	if err != nil {
		return answer{Error: err.Error()}
	}
	seen := false
	for lines := bufio.NewScanner(pipe); !seen && lines.Scan(); {
		seen = strings.Contains(lines.Text(), "system_info:")
	}
	_ = server.Process.Kill()
	_ = server.Wait()
	list := exec.Command(program, "--list-devices", "--offline", "--verbose")
	list.Env = environment()
	out, err := list.CombinedOutput()
	if err != nil || !seen || !strings.Contains(string(out), "Available devices") {
		return answer{Error: fmt.Sprintf("probes: system_info seen: %v; list: %v, %s", seen, err, out)}
	}
	return answer{OK: true}
}

func freePort() int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// setting is one of Ollama's, or what it takes without.
func setting(name, otherwise string) string {
	if v := os.Getenv("OLLAMA_" + name); v != "" {
		return v
	}
	return otherwise
}

func arguments(model string, port int, more []string) []string {
	parallel := 1
	_, _ = fmt.Sscan(setting("NUM_PARALLEL", "1"), &parallel)
	context := 2048
	_, _ = fmt.Sscan(setting("CONTEXT_LENGTH", "2048"), &context)
	args := []string{"--model", model, "--port", fmt.Sprint(port), "--host", "127.0.0.1", "--no-webui", "--offline",
		"-c", fmt.Sprint(context * parallel), "-np", fmt.Sprint(parallel), "--log-verbosity", "4", "--no-log-prefix", "--no-log-timestamps"}
	args = append(args, more...)
	args = append(args, "--load-mode", "none")
	if kind := setting("KV_CACHE_TYPE", ""); kind != "" {
		args = append(args, "--cache-type-k", kind, "--cache-type-v", kind)
	}
	flash := map[string]string{"1": "on", "0": "off", "": "auto"}[setting("FLASH_ATTENTION", "")]
	return append(args, "--flash-attn", flash, "-b", "512", "-ub", "512", "-t", "1", "--context-shift", "--keep", "4")
}

func load(name, model string, more []string) answer {
	r := &runner{port: freePort(), done: make(chan struct{})}
	r.cmd = exec.Command(program, arguments(model, r.port, more)...)
	r.cmd.Env = environment()
	r.cmd.Stdout, r.cmd.Stderr = &r.log, &r.log
	if err := r.cmd.Start(); err != nil {
		return answer{Error: err.Error()}
	}
	runners[name] = r
	go func() { _ = r.cmd.Wait(); close(r.done) }()
	for {
		select {
		case <-r.done:
			return answer{PID: r.cmd.Process.Pid, Error: r.log.text()}
		case <-time.After(20 * time.Millisecond):
		}
		resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/health", r.port))
		if err != nil {
			continue
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return answer{OK: true, PID: r.cmd.Process.Pid, Port: r.port}
		}
	}
}
