package vault_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/keys"
	"github.com/kvshield/kvshield/enclave/internal/shield"
	"github.com/kvshield/kvshield/enclave/vault"
	"github.com/kvshield/kvshield/internal/gguf"
	"github.com/kvshield/kvshield/plugin"
)

// asEnclave makes the test binary an enclave process whose keys the test knows.
const asEnclave = "KVSHIELD_TEST_KNOWN_KEYS"

// knownKeys are bytes that occur nowhere by chance.
type knownKeys struct{}

func (knownKeys) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(i*37) ^ 0xa5
	}
	return len(p), nil
}

type noTEE struct{}

func (noTEE) Attest(context.Context, []byte) (enclave.Report, error) {
	return enclave.Report{Backend: "test", Statement: "test keys"}, nil
}

func TestMain(m *testing.M) {
	if os.Getenv(asEnclave) == "" {
		os.Exit(m.Run())
	}
	flags := flag.NewFlagSet("enclave", flag.ExitOnError)
	flags.String("tee", "", "")
	dir := flags.String("runtime-dir", "", "")
	_ = flags.Parse(os.Args[1:])
	v := vault.New(vault.Options{Random: knownKeys{}})
	if err := plugin.Serve(plugin.Implementation{Loader: v, Inverter: v, Attester: noTEE{}}, *dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

var (
	repository = filepath.Join("..", "..")
	demoModel  = filepath.Join(repository, "examples", "model", "demo.gguf")
)

func built(t *testing.T, path string) string {
	t.Helper()
	absolute, err := filepath.Abs(filepath.Join(repository, path))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(absolute); err != nil {
		t.Fatalf("%s is missing: run `make build engine`", path)
	}
	return absolute
}

// secrets are the key and every permutation table that the known key gives the demo model, in the forms in which a
// program would hold them.
func secrets(t *testing.T) map[string][]byte {
	t.Helper()
	key := make([]byte, 32)
	_, _ = knownKeys{}.Read(key)
	found := map[string][]byte{"the root key": key}
	root, err := keys.New(bytes.NewReader(key))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Destroy()
	shape := demoShape(t)
	p, err := shield.Draw(shape, root)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Wipe()
	for layer := range shape.Layers {
		table := make([]uint16, shape.RowFloats())
		p.Inverse(layer, table)
		addForms(found, fmt.Sprintf("layer %d, inverse", layer), table)
		for head := range shape.HeadsKV {
			_, rows := p.Head(shield.Value, layer, head)
			addForms(found, fmt.Sprintf("layer %d, value head %d", layer, head), rows)
		}
	}
	_, rows := p.Head(shield.Key, 0, 0)
	addForms(found, "key rows", rows)
	return found
}

func demoShape(t *testing.T) shield.Shape {
	t.Helper()
	f, g, err := gguf.Open(demoModel)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	plan, err := shield.Read([]shield.File{{File: g, Data: f}})
	if err != nil {
		t.Fatal(err)
	}
	return plan.Shape
}

func addForms(found map[string][]byte, name string, table []uint16) {
	var w1, w2, w4, w8 []byte
	for _, v := range table {
		w1 = append(w1, byte(v))
		w2 = binary.LittleEndian.AppendUint16(w2, v)
		w4 = binary.LittleEndian.AppendUint32(w4, uint32(v))
		w8 = binary.LittleEndian.AppendUint64(w8, uint64(v))
	}
	found[name+" as bytes"], found[name+" as 16 bits"] = w1, w2
	found[name+" as 32 bits"], found[name+" as 64 bits"] = w4, w8
}

// scan looks for patterns in all memory of a process that can be read.
func scan(t *testing.T, pid int, patterns map[string][]byte) (found []string) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	seen := map[string]bool{}
	read := int64(0)
	for lines := bufio.NewScanner(bytes.NewReader(maps)); lines.Scan(); {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); err != nil || mode[0] != 'r' || strings.Contains(lines.Text(), "[vvar") {
			continue
		}
		b, _ := io.ReadAll(io.NewSectionReader(memory, from, to-from)) // device and guard pages end it early
		read += int64(len(b))
		for name, pattern := range patterns {
			if !seen[name] && bytes.Contains(b, pattern) {
				seen[name] = true
				found = append(found, name)
			}
		}
	}
	t.Logf("process %d: %d MiB read", pid, read>>20)
	return found
}

// shielded is a running `kvshield serve` whose enclave is this test binary.
type shielded struct {
	cmd *exec.Cmd
	log *bytes.Buffer
	url string
}

func startShielded(t *testing.T) *shielded {
	t.Helper()
	enclaveProgram, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := &shielded{log: &bytes.Buffer{}, url: "http://127.0.0.1:18479"}
	s.cmd = exec.Command(built(t, "bin/kvshield"), "serve", "--mode", "permute", "-m", demoModel, "--listen", "127.0.0.1:18479", "--enclave", enclaveProgram,
		"--engine", built(t, ".engine/bin/llama-server"), "--log-level", "debug", "-v", "--", "-t", "1", "-v")
	s.cmd.Env = append(os.Environ(), asEnclave+"=1")
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if resp, err := http.Get(s.url + "/health"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return s
			}
		}
		if time.Now().After(end) {
			s.stop()
			t.Fatalf("not ready\n%s", s.log)
		}
	}
}

func (s *shielded) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	_ = s.cmd.Wait()
}

func engineOf(t *testing.T, pid int) int {
	t.Helper()
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, path := range tasks {
		b, _ := os.ReadFile(path)
		for _, child := range strings.Fields(string(b)) {
			if exe, _ := os.Readlink("/proc/" + child + "/exe"); filepath.Base(exe) == "llama-server" {
				var n int
				_, _ = fmt.Sscan(child, &n)
				return n
			}
		}
	}
	t.Fatal("no engine process")
	return 0
}

// The permutation never leaves the enclave process: neither the engine's nor the proxy's memory holds a key or a table, and
// no log names one.
func TestSecretsStayInTheEnclave(t *testing.T) {
	s := startShielded(t)
	stopped := false
	defer func() {
		if !stopped {
			s.stop()
		}
	}()
	resp, err := http.Post(s.url+"/completion", "application/json", strings.NewReader(`{"prompt":"At last","n_predict":50}`))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()

	patterns := secrets(t)
	engine := engineOf(t, s.cmd.Process.Pid)
	for name, pid := range map[string]int{"engine": engine, "proxy": s.cmd.Process.Pid} {
		for _, what := range scan(t, pid, patterns) {
			t.Errorf("the %s's memory holds %s", name, what)
		}
	}
	// What is allowed to be there is found, so the scan works.
	if found := scan(t, engine, map[string][]byte{"marker": []byte("rope_freqs.weight")}); len(found) == 0 {
		t.Error("the scan does not find the marker's name in the engine's memory, where it must be")
	}
	s.stop()
	stopped = true
	checkLog(t, s.log.Bytes(), patterns)
}

func checkLog(t *testing.T, log []byte, patterns map[string][]byte) {
	t.Helper()
	if !bytes.Contains(log, []byte("level=DEBUG")) {
		t.Errorf("the log is not the most verbose one:\n%.500s", log)
	}
	for name, pattern := range patterns {
		for _, form := range [][]byte{pattern, []byte(hex.EncodeToString(pattern)), []byte(base64.StdEncoding.EncodeToString(pattern)),
			[]byte(strings.Trim(fmt.Sprint(pattern), "[]"))} {
			if bytes.Contains(log, form) {
				t.Errorf("the log holds %s", name)
			}
		}
	}
}

// Without the hook a shielded model is of no use.
func TestShieldedModelAloneIsGarbage(t *testing.T) {
	out := filepath.Join(t.TempDir(), "shielded.gguf")
	if err := os.WriteFile(out, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	v := vault.New(vault.Options{})
	res, err := v.Load(t.Context(), enclave.LoadRequest{Sources: []string{demoModel}, Outputs: []string{out}})
	if err != nil {
		t.Fatal(err)
	}
	copyRest(t, res, demoModel, out)
	stock := complete(t, demoModel)
	if len(stock) < 40 {
		t.Fatalf("stock says only %q", stock)
	}
	// It may well speak of the same things: what it learnt outside of attention is all there.
	if text := complete(t, out); text == "" || strings.HasPrefix(text, stock[:20]) {
		t.Errorf("the shielded model without the hook says %q, as stock does", text)
	}
}

func copyRest(t *testing.T, res enclave.LoadResult, from, to string) {
	t.Helper()
	source, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(to, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, c := range res.Copies {
		if _, err := f.WriteAt(source[c.From:c.From+c.Length], c.To); err != nil {
			t.Fatal(err)
		}
	}
}

// complete asks the stock llama-completion, which sometimes loses its output at exit, until it says something.
func complete(t *testing.T, model string) string {
	t.Helper()
	for range 5 {
		out, err := exec.Command(built(t, ".engine/bin/llama-completion"), "-m", model, "-t", "1", "-n", "40", "--temp", "0", "-no-cnv", "--no-display-prompt", "-p", "At last").Output()
		if err != nil {
			t.Fatal(err)
		}
		if text := strings.TrimSpace(string(out)); text != "" {
			return text
		}
	}
	return ""
}
