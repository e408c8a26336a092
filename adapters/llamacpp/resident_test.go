package llamacpp_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/resident"
	"github.com/kvshield/kvshield/hooks/dataplane"
)

func newKeeper(t *testing.T) *resident.Resident {
	t.Helper()
	keeper, err := resident.New(resident.Options{Threads: 1, Digest: func(enclave.ModelID) ([32]byte, bool) { return [32]byte{1}, true }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(keeper.Close)
	return keeper
}

// resides is a llama-server whose cache a keeper in this process holds.
type resides struct {
	keeper *resident.Resident
	client *http.Client
	slots  string // directory of saved slots
	stop   func()
}

func startResides(t *testing.T, keeper *resident.Resident, args ...string) *resides {
	t.Helper()
	f := start(t, func(f *fake) { f.keeper, f.capacity = keeper, dataplane.ResidentCapacity })
	r := &resides{keeper: keeper, slots: t.TempDir()}
	s, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: engine("llama-server"), Model: demoModel, Socket: socketPath(t),
		Env: environment(f.socket()), Args: append([]string{"-t", "1", "--slot-save-path", r.slots + "/"}, args...)})
	if err != nil {
		t.Fatal(err)
	}
	r.stop = func() { s.Stop(); f.waitGone(t) }
	t.Cleanup(s.Kill)
	if err := s.WaitHealthy(bounded(t)); err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Dial(ctx) }}
	t.Cleanup(transport.CloseIdleConnections)
	r.client = &http.Client{Transport: transport, Timeout: patience}
	return r
}

// used is what the keeper holds, in bytes.
func (r *resides) used() int64 {
	_, used, _, _ := r.keeper.Usage()
	return used
}

// waitUsed waits until the keeper holds what is wanted: an engine answers before it has tidied up.
func (r *resides) waitUsed(t *testing.T, what string, want func(int64) bool) {
	t.Helper()
	for end := time.Now().Add(patience); !want(r.used()); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: the enclave still holds %d bytes", what, r.used())
		}
	}
}

func (r *resides) post(t *testing.T, path string, body any) (int, []byte) {
	t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := r.client.Post("http://engine"+path, "application/json", bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, answer
}

type said struct {
	Content string `json:"content"`
	Cached  int    `json:"tokens_cached"`
	Timings struct {
		CacheN  int `json:"cache_n"`
		PromptN int `json:"prompt_n"`
	} `json:"timings"`
}

func (r *resides) ask(t *testing.T, slot int, prompt string) said {
	t.Helper()
	status, b := r.post(t, "/completion", map[string]any{"prompt": prompt, "n_predict": 20, "temperature": 0, "cache_prompt": true, "id_slot": slot})
	var s said
	if err := json.Unmarshal(b, &s); err != nil || status != http.StatusOK {
		t.Fatalf("%d %s", status, b)
	}
	return s
}

func (r *resides) slot(t *testing.T, slot, action, file string) (int, string) {
	t.Helper()
	status, b := r.post(t, "/slots/"+slot+"?action="+action, map[string]any{"filename": file})
	return status, string(b)
}

const (
	sailors  = "The sailors were on the deck of the ship when the captain came to see the whale"
	citizens = "Fellow citizens of the Senate and of the House of Representatives, I have the honor"
)

func TestErasedSlotsAreWiped(t *testing.T) {
	for name, args := range map[string][]string{
		"streams": {"-np", "2", "--no-kv-unified", "-cram", "0"},
		"unified": {"-np", "2", "--kv-unified", "-cram", "0"},
	} {
		t.Run(name, func(t *testing.T) {
			r := startResides(t, newKeeper(t), args...)
			r.ask(t, 0, sailors)
			r.ask(t, 1, citizens)
			if r.used() == 0 {
				t.Fatal("the enclave holds nothing after two conversations")
			}
			r.slot(t, "0", "erase", "")
			if again := r.ask(t, 1, citizens); again.Timings.CacheN == 0 {
				t.Error("erasing one slot took the other's rows")
			}
			r.slot(t, "1", "erase", "")
			r.waitUsed(t, "both slots are erased", func(n int64) bool { return n == 0 })
		})
	}
}

func TestEndOfTheEngineWipes(t *testing.T) {
	r := startResides(t, newKeeper(t))
	r.ask(t, 0, sailors)
	r.stop()
	reserved, used, _, _ := r.keeper.Usage()
	if reserved != 0 || used != 0 {
		t.Errorf("the enclave keeps %d bytes and reserves %d for an engine that is gone", used, reserved)
	}
}

// Cells that one conversation leaves are used by the next one, which must be answered as in an engine that never had the first.
func TestReusedCellsShowNothingOfTheirFormerOwner(t *testing.T) {
	args := []string{"-np", "1", "-c", "256", "-cram", "0"}
	want := startResides(t, newKeeper(t), args...).ask(t, 0, citizens)
	r := startResides(t, newKeeper(t), args...)
	for range 3 {
		r.ask(t, 0, strings.Repeat(sailors+". ", 5))
		if got := r.ask(t, 0, citizens); got.Content != want.Content {
			t.Errorf("after another conversation: %q, want %q", got.Content, want.Content)
		}
	}
}

func TestSavedSlotIsSealed(t *testing.T) {
	keeper := newKeeper(t)
	r := startResides(t, keeper, "-np", "2", "-cram", "0")
	want := r.ask(t, 0, sailors)
	if status, b := r.slot(t, "0", "save", "slot"); status != http.StatusOK {
		t.Fatalf("save: %d %s", status, b)
	}
	file := filepath.Join(r.slots, "slot")
	sealed, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	checkSealed(t, r, sealed)

	r.slot(t, "0", "erase", "")
	if status, b := r.slot(t, "1", "restore", "slot"); status != http.StatusOK {
		t.Fatalf("restore: %d %s", status, b)
	}
	if got := r.ask(t, 1, sailors); got.Content != want.Content || got.Timings.CacheN == 0 {
		t.Errorf("after a restore: %+v, want %q from restored rows", got, want.Content)
	}
	t.Run("refused", func(t *testing.T) { refuseSpoiled(t, r, sealed) })
	t.Run("another enclave", func(t *testing.T) {
		other := startResides(t, newKeeper(t), "-np", "2")
		if err := os.WriteFile(filepath.Join(other.slots, "slot"), sealed, 0o600); err != nil {
			t.Fatal(err)
		}
		if status, _ := other.slot(t, "0", "restore", "slot"); status == http.StatusOK {
			t.Error("a state that another enclave sealed was restored")
		}
	})
	t.Run("the same enclave, another engine", func(t *testing.T) {
		other := startResides(t, keeper, "-np", "2")
		if err := os.WriteFile(filepath.Join(other.slots, "slot"), sealed, 0o600); err != nil {
			t.Fatal(err)
		}
		if status, b := other.slot(t, "0", "restore", "slot"); status != http.StatusOK {
			t.Fatalf("restore: %d %s", status, b)
		}
		if got := other.ask(t, 0, sailors); got.Content != want.Content || got.Timings.CacheN == 0 {
			t.Errorf("after a restore: %+v, want %q from restored rows", got, want.Content)
		}
	})
}

// checkSealed looks for the conversation in what was saved: its token ids, and the zeros that stand for keys in the engine.
func checkSealed(t *testing.T, r *resides, sealed []byte) {
	t.Helper()
	if !bytes.HasPrefix(sealed, []byte("KVSEALED")) {
		t.Errorf("the file begins with % x", sealed[:8])
	}
	_, b := r.post(t, "/tokenize", map[string]any{"content": sailors})
	var tokens struct{ Tokens []int32 }
	if err := json.Unmarshal(b, &tokens); err != nil || len(tokens.Tokens) < 8 {
		t.Fatalf("tokens: %v %s", err, b)
	}
	var ids []byte
	for _, id := range tokens.Tokens[:8] {
		ids = binary.LittleEndian.AppendUint32(ids, uint32(id))
	}
	for name, part := range map[string][]byte{"token ids": ids[:8], "zeros": make([]byte, 32)} {
		if bytes.Contains(sealed[320:], part) {
			t.Errorf("the file holds %s in clear", name)
		}
	}
}

func refuseSpoiled(t *testing.T, r *resides, sealed []byte) {
	for name, spoil := range map[string]func([]byte) []byte{
		"a bit":     func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"header":    func(b []byte) []byte { b[20] ^= 1; return b },
		"cut":       func(b []byte) []byte { return b[:len(b)-1] },
		"no end":    func(b []byte) []byte { return b[:len(b)-40] },
		"empty":     func([]byte) []byte { return nil },
		"not ours":  func([]byte) []byte { return bytes.Repeat([]byte("ggsq"), 200) },
		"long text": func(b []byte) []byte { binary.LittleEndian.PutUint32(b[324:], 1<<31); return b },
	} {
		if err := os.WriteFile(filepath.Join(r.slots, "spoiled"), spoil(slices.Clone(sealed)), 0o600); err != nil {
			t.Fatal(err)
		}
		if status, b := r.slot(t, "0", "restore", "spoiled"); status == http.StatusOK {
			t.Errorf("%s: restored, %s", name, b)
		}
	}
	if got := r.ask(t, 0, citizens); got.Content == "" {
		t.Error("the server does not answer after refusing states")
	}
}

// The server puts slots aside in host memory when another conversation takes their place, and takes them back.
func TestPromptCacheInHostMemory(t *testing.T) {
	r := startResides(t, newKeeper(t), "-np", "1", "-cram", "64")
	want := r.ask(t, 0, sailors)
	r.ask(t, 0, citizens)
	if got := r.ask(t, 0, sailors); got.Content != want.Content || got.Timings.CacheN < 10 {
		t.Errorf("%+v, want %q with rows from the prompt cache", got, want.Content)
	}
}

// Two contexts of one process compute at the same time, each with a batch and a mask of its own.
func TestContextsSideBySide(t *testing.T) {
	want := stock(t, "load", "speak")
	for range 3 {
		f := start(t, func(f *fake) { f.keeper, f.capacity = newKeeper(t), dataplane.ResidentCapacity })
		if got := runHost(t, f.socket(), demoModel, "load", "speak"); got.stdout != want {
			t.Errorf("two contexts said\n%swant\n%s%s", got.stdout, want, got.stderr)
		}
	}
}
