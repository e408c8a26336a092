package live_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/audit/element"
	"github.com/kvshield/kvshield/audit/live"
	"github.com/kvshield/kvshield/audit/slotfile"
	"github.com/kvshield/kvshield/internal/gguf"
)

const (
	root      = "../.."
	demoModel = root + "/examples/model/demo.gguf"
	layers    = 5 // of the demo model
	headsKV   = 2
)

// engine is a llama-server under a supervisor that allows dumps.
type engine struct {
	*supervisor.Supervisor
	server *llamacpp.Server
	client *http.Client
	dir    string
}

func start(t *testing.T, observe bool, model string, env []string, args ...string) *engine {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "kvs-live-") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := supervisor.New(t.Context(), supervisor.Config{Hook: root + "/bin/libkvshield.so", Enclave: root + "/bin/kvshield-enclave",
		Args: []string{"--tee", "software"}, Log: slog.New(slog.DiscardHandler), Audit: true, Observe: observe})
	if err != nil {
		t.Fatalf("%v; run `make build`", err)
	}
	t.Cleanup(s.Close)
	server, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: root + "/.engine/bin/llama-server", Model: model, Socket: filepath.Join(dir, "s.sock"),
		Args: append([]string{"-np", "1", "-c", "512", "-t", "1", "--cache-ram", "0", "--slot-save-path", dir + "/"}, args...), Env: append(s.Environment(os.Environ()), env...)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Stop)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := server.WaitHealthy(ctx); err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return server.Dial(ctx) }}
	t.Cleanup(transport.CloseIdleConnections)
	return &engine{s, server, &http.Client{Transport: transport}, dir}
}

func (e *engine) post(t *testing.T, path string, request map[string]any) []byte {
	t.Helper()
	body, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := e.client.Post("http://engine"+path, "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatalf("%v: %v", err, e.server.Err())
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s: %s, %v", path, resp.Status, answer, err)
	}
	return answer
}

// complete continues a text greedily, from the slot's cache as far as that goes.
func (e *engine) complete(t *testing.T, prompt string) string {
	t.Helper()
	var c struct {
		Content string `json:"content"`
	}
	answer := e.post(t, "/completion", map[string]any{"prompt": prompt, "n_predict": 40, "temperature": 0, "ignore_eos": true, "cache_prompt": true, "id_slot": 0})
	if err := json.Unmarshal(answer, &c); err != nil {
		t.Fatal(err)
	}
	return c.Content
}

func (e *engine) slot(t *testing.T) *slotfile.File {
	t.Helper()
	e.post(t, "/slots/0?action=save", map[string]any{"filename": "slot.bin"})
	f, err := slotfile.Read(filepath.Join(e.dir, "slot.bin"), slotfile.Shape{Layers: layers, HeadsKV: headsKV})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// asked tells when a request was sent: nobody looks at Done before.
type asked struct {
	context.Context
	sent chan<- struct{}
}

func (a asked) Done() <-chan struct{} {
	select {
	case a.sent <- struct{}{}:
	default:
	}
	return a.Context.Done()
}

type dumped struct {
	dump *live.Dump
	err  error
}

// ask asks for a dump, which the next completion makes.
func (e *engine) ask(t *testing.T) <-chan dumped {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	sent, answer := make(chan struct{}, 1), make(chan dumped, 1)
	go func() {
		f, err := e.Dump(asked{ctx, sent}, e.server.PID())
		if err != nil {
			answer <- dumped{nil, err}
			return
		}
		defer f.Close()
		d, err := live.Read(f)
		answer <- dumped{d, err}
	}()
	select {
	case <-sent:
	case d := <-answer:
		t.Fatal(d.err)
	}
	return answer
}

// answered waits for what was asked. The hook may have read the request when the engine had nothing left to compute: then it is given
// more.
func (e *engine) answered(t *testing.T, answer <-chan dumped, prompt string) dumped {
	t.Helper()
	for {
		select {
		case d := <-answer:
			return d
		case <-time.After(time.Second):
			e.complete(t, prompt)
		}
	}
}

func vulkan(t *testing.T) []string {
	t.Helper()
	f, err := os.Open(root + "/.engine/vulkan.env")
	if err != nil {
		t.Fatalf("no Vulkan device: %v; run `make engine`", err)
	}
	defer f.Close()
	var env []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if strings.Contains(lines.Text(), "=") {
			env = append(env, lines.Text())
		}
	}
	return env
}

// A dump in the middle of a conversation holds the rows that a slot file of the same moment holds, and leaves the text as it is.
func TestDumpOfAConversation(t *testing.T) {
	for name, test := range map[string]struct {
		vulkan     bool
		args       []string
		transposed bool
		cache      gguf.Type
		place      string // of the compute buffers
	}{
		"flash attention":    {false, []string{"-fa", "on"}, false, gguf.F16, "CPU"},
		"no flash attention": {false, []string{"-fa", "off"}, true, gguf.F16, "CPU"},
		"quantised cache":    {false, []string{"-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"}, false, gguf.Q8_0, "CPU"},
		"wide cache":         {false, []string{"-fa", "off", "-ctk", "f32", "-ctv", "f32"}, true, gguf.F32, "CPU"},
		"Vulkan":             {true, []string{"-fa", "on", "-ngl", "99", "-dev", "Vulkan0"}, false, gguf.F16, "Vulkan0"},
		"Vulkan, no flash":   {true, []string{"-fa", "off", "-ngl", "99", "-dev", "Vulkan0"}, true, gguf.F16, "Vulkan0"},
	} {
		for _, observe := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, observed %v", name, observe), func(t *testing.T) {
				var env []string
				if test.vulkan {
					env = vulkan(t)
				}
				e := start(t, observe, demoModel, env, test.args...)
				const prompt = "The Constitution of the United States"
				first := e.complete(t, prompt)
				slot := e.slot(t)
				answer := e.ask(t)
				second := e.complete(t, prompt+first)
				d := e.answered(t, answer, prompt+first)
				if d.err != nil {
					t.Fatal(d.err)
				}
				if d.dump.Transposed != test.transposed || d.dump.Cache[0].Type != test.cache {
					t.Errorf("transposed %v, cache of %v", d.dump.Transposed, d.dump.Cache[0].Type)
				}
				checkRows(t, d.dump, slot)
				checkWeights(t, d.dump.Weights, observe)
				checkBuffers(t, d.dump.Buffers, test.place)

				e.post(t, "/slots/0?action=erase", nil)
				if again := e.complete(t, prompt); again != first {
					t.Fatalf("the same prompt gives %q, and gave %q", again, first)
				}
				if undumped := e.complete(t, prompt+first); undumped != second {
					t.Errorf("with a dump %q, without %q", second, undumped)
				}
			})
		}
	}
}

// An engine on a CPU may rearrange quantised weights for its instructions, and has no way to give them back.
func TestWeightsThatCannotBeReadBack(t *testing.T) {
	model := filepath.Join(t.TempDir(), "q4_0.gguf")
	if out, err := exec.Command(root+"/.engine/bin/llama-quantize", "--pure", demoModel, model, "q4_0", "1").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	e := start(t, true, model, nil)
	answer := e.ask(t)
	e.complete(t, "At last")
	d := e.answered(t, answer, "At last")
	if d.err != nil {
		t.Fatal(d.err)
	}
	if len(d.dump.Weights) != 3 || len(d.dump.Cache) != 2*layers || len(d.dump.Buffers) == 0 {
		t.Errorf("%d weights, %d cache tensors, %d buffers", len(d.dump.Weights), len(d.dump.Cache), len(d.dump.Buffers))
	}
	for _, w := range d.dump.Weights {
		if elements, size, _ := w.Type.Block(); w.Type != gguf.Q4_0 || len(w.Data) != 0 && int64(len(w.Data)) != w.Dims[0]*w.Dims[1]/elements*size {
			t.Errorf("%s: %d bytes of %v %v", w.Name, len(w.Data), w.Type, w.Dims)
		}
		t.Logf("%s: %d bytes", w.Name, len(w.Data))
	}
}

// checkRows compares the cache of a dump with a slot file, number by number. The hook may have got the request only when the next
// completion had begun: then there are more rows.
func checkRows(t *testing.T, d *live.Dump, slot *slotfile.File) {
	t.Helper()
	got, err := d.Snapshot(layers, headsKV)
	if err != nil {
		t.Fatal(err)
	}
	want := slot.Snapshot
	if got.Tokens() < want.Tokens() || got.Tokens() > want.Tokens()+40 || got.Type != want.Type || len(got.Layers) != len(want.Layers) {
		t.Fatalf("%d rows of %s in %d layers; the slot file has %d of %s in %d", got.Tokens(), got.Type, len(got.Layers), want.Tokens(), want.Type, len(want.Layers))
	}
	got = got.First(want.Tokens())
	for i := range got.Layers {
		for what, m := range map[string][2]audit.Matrix{"keys": {got.Layers[i].K, want.Layers[i].K}, "values": {got.Layers[i].V, want.Layers[i].V}} {
			if block := map[string]int{"keys": slot.RotatedK, "values": slot.RotatedV}[what]; block > 0 {
				element.Unrotate(m[0].Data, block)
			}
			if !slices.Equal(m[0].Data, m[1].Data) {
				t.Errorf("layer %d: other %s than in the slot file", i, what)
			}
		}
	}
}

// checkWeights compares layer 0's weights with the model's file: the same bytes in an observed engine, others in a shielded one.
func checkWeights(t *testing.T, weights []live.Tensor, observe bool) {
	t.Helper()
	f, g, err := gguf.Open(demoModel)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if len(weights) != 3 {
		t.Errorf("%d weights", len(weights))
	}
	for _, w := range weights {
		in, found := g.Tensor(w.Name)
		original := make([]byte, in.Size)
		if _, err := f.ReadAt(original, g.DataOffset+in.Offset); err != nil || !found {
			t.Fatalf("%s: %v", w.Name, err)
		}
		if w.Type != in.Type || len(w.Data) != len(original) || bytes.Equal(w.Data, original) != observe {
			t.Errorf("%s: %d bytes of %v; the model's file has %d of %v; equal %v", w.Name, len(w.Data), w.Type, len(original), in.Type, bytes.Equal(w.Data, original))
		}
	}
}

// checkBuffers wants a compute buffer on the device, with something in it.
func checkBuffers(t *testing.T, buffers []live.Tensor, place string) {
	t.Helper()
	for _, b := range buffers {
		if b.Name == place && slices.ContainsFunc(b.Data, func(v byte) bool { return v != 0 }) {
			return
		}
	}
	t.Errorf("no buffer on %s has anything in it", place)
}
