package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/internal/gguf"
)

var tiny = []string{"-layers", "2", "-width", "64", "-heads", "4", "-kv-heads", "2", "-ffn", "96", "-vocab", "500", "-context", "256"}

// write makes a tiny model and returns its path.
func write(t *testing.T, flags ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "model.gguf")
	if err := run(context.Background(), append(append([]string{"-o", path}, tiny...), flags...), io.Discard); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestModelHasTheShapeAskedFor(t *testing.T) {
	r, f, err := gguf.Open(write(t, "-rope-freqs"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for key, want := range map[string]uint64{
		"llama.block_count": 2, "llama.embedding_length": 64, "llama.attention.head_count": 4,
		"llama.attention.head_count_kv": 2, "llama.feed_forward_length": 96, "llama.vocab_size": 500,
		"llama.context_length": 256, "llama.rope.dimension_count": 16, "general.file_type": 7,
	} {
		if got, _, err := f.Uint(key); got != want || err != nil {
			t.Errorf("%s is %d, %v, expected %d", key, got, err, want)
		}
	}
	for name, want := range map[string][]int64{
		"token_embd.weight": {64, 500}, "output.weight": {64, 500}, "output_norm.weight": {64},
		"rope_freqs.weight": {8}, "blk.1.attn_q.weight": {64, 64}, "blk.1.attn_k.weight": {64, 32},
		"blk.0.attn_v.weight": {64, 32}, "blk.1.attn_output.weight": {64, 64}, "blk.1.ffn_down.weight": {96, 64},
	} {
		tensor, ok := f.Tensor(name)
		if !ok || len(tensor.Dims) != len(want) || tensor.Dims[0] != want[0] || tensor.Rows()*tensor.Dims[0] != product(want) {
			t.Errorf("%s is %v, expected %v", name, tensor.Dims, want)
		}
	}
}

func product(list []int64) int64 {
	n := int64(1)
	for _, d := range list {
		n *= d
	}
	return n
}

func TestDefaultHasABillionParameters(t *testing.T) {
	_, m, err := parseFlags([]string{"-o", "unused"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if n := m.parameters(); n < 1_050_000_000 || n > 1_150_000_000 {
		t.Errorf("%d parameters", n)
	}
	b, err := m.build()
	if err != nil {
		t.Fatal(err)
	}
	size, err := b.Size()
	if want := m.parameters() / 32 * 34; err != nil || size < want || size > want+want/1000 {
		t.Errorf("%d bytes of data, %v, expected about %d", size, err, want)
	}
}

func TestSameFlagsGiveTheSameBytes(t *testing.T) {
	var files [3][]byte
	for i, seed := range []string{"7", "7", "8"} {
		data, err := os.ReadFile(write(t, "-seed", seed))
		if err != nil {
			t.Fatal(err)
		}
		files[i] = data
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("the same seed gave other bytes")
	}
	if bytes.Equal(files[0], files[2]) {
		t.Error("another seed gave the same bytes")
	}
}

func TestFlagMistakes(t *testing.T) {
	for _, c := range []struct{ flags, says string }{
		{"", "no output file"},
		{"-o x y", "more than flags"},
		{"-o x -type Q4_0", `no weights of type "Q4_0"`},
		{"-o x -heads 3", "no even head dimension"},
		{"-o x -kv-heads 5", "no multiple of 5"},
		{"-o x -vocab 100", "at least 259"},
		{"-o x -layers 0", "a size of 0"},
		{"-o x -width -64", "a size of -64"},
		{"-o x -width 48 -heads 4 -kv-heads 4", "48 elements are no multiple"},
		{"-o x -nonsense", "nonsense"},
	} {
		err := run(context.Background(), strings.Fields(c.flags), io.Discard)
		if !errors.As(err, new(usageError)) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v", c.flags, err)
		}
	}
}

func TestNothingIsLeftBehindWhenInterrupted(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := run(ctx, append([]string{"-o", filepath.Join(dir, "model.gguf")}, tiny...), io.Discard)
	if err == nil || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("got %v", err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestPiecesCanBeMergedFromTheirPrefixes(t *testing.T) {
	seen := map[string]bool{"": true}
	for i := range 32000 - fixedTokens {
		p := piece(i)
		if seen[p] {
			t.Fatalf("piece %d is %q again", i, p)
		}
		if runes := []rune(p); !seen[string(runes[:len(runes)-1])] {
			t.Fatalf("piece %d is %q, and what comes before its last letter is no piece", i, p)
		}
		seen[p] = true
	}
}

func TestNoiseHasTheVarianceOfItsWidth(t *testing.T) {
	const columns, count = 300, 1 << 16
	var out bytes.Buffer
	if err := newNoise(1, "w", columns).write(&out, gguf.F32, count); err != nil {
		t.Fatal(err)
	}
	sum, squares := 0.0, 0.0
	for raw := out.Bytes(); len(raw) > 0; raw = raw[4:] {
		v := float64(math.Float32frombits(uint32(raw[0]) | uint32(raw[1])<<8 | uint32(raw[2])<<16 | uint32(raw[3])<<24))
		sum += v
		squares += v * v
	}
	if mean := sum / count; math.Abs(mean) > 0.01/math.Sqrt(columns) {
		t.Errorf("mean %g", mean)
	}
	if got := squares / count * columns; got < 0.98 || got > 1.02 {
		t.Errorf("variance %g of the one expected", got)
	}
}

func TestHalf(t *testing.T) {
	for _, c := range []struct {
		x    float32
		want uint16
	}{
		{0, 0}, {0.5, 0x3800}, {-0.5, 0xb800}, {1, 0x3c00}, {0.1, 0x2e66}, {1.0 / 16384, 0x0400},
		{1.0 / 65536, 0}, {float32(math.Copysign(1e-20, -1)), 0x8000},
	} {
		if got := half(c.x); got != c.want {
			t.Errorf("%g: got %#04x, expected %#04x", c.x, got, c.want)
		}
	}
}

func TestFactorsStretchLongWavesOnly(t *testing.T) {
	list := factors(64)
	if list[0] != 1 || list[31] != 8 {
		t.Errorf("from %g to %g, expected from 1 to 8", list[0], list[31])
	}
	between := 0
	for i := 1; i < len(list); i++ {
		if list[i] < list[i-1] {
			t.Errorf("factor %d is %g after %g", i, list[i], list[i-1])
		}
		if list[i] > 1 && list[i] < 8 {
			between++
		}
	}
	if between == 0 {
		t.Error("no factor between 1 and 8")
	}
}

// The engine is the judge of whether this is a Llama model. llama-bench says so in its report;
// llama-completion would do, but may end before the last of its text is written.
func TestEngineRunsTheModel(t *testing.T) {
	engine := "../../.engine/bin/llama-bench"
	if _, err := os.Stat(engine); err != nil {
		t.Skipf("no engine: %v; run make engine", err)
	}
	for _, flags := range [][]string{{"-type", "Q8_0"}, {"-type", "F16", "-tied"}, {"-type", "F32", "-rope-freqs"}} {
		path := write(t, flags...)
		cmd := exec.Command(engine, "-m", path, "-p", "8", "-n", "8", "-r", "1", "-t", "1", "-ngl", "0", "-o", "json")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Errorf("%v: %v\n%s", flags, err, stderr.Bytes())
			continue
		}
		var runs []struct {
			Parameters int64   `json:"model_n_params"`
			Speed      float64 `json:"avg_ts"`
		}
		if err := json.Unmarshal(out, &runs); err != nil || len(runs) != 2 {
			t.Errorf("%v: %v in %q", flags, err, out)
			continue
		}
		for _, r := range runs {
			if r.Parameters != elements(t, path) || r.Speed <= 0 {
				t.Errorf("%v: the engine saw %d parameters of %d, and ran at %g", flags, r.Parameters, elements(t, path), r.Speed)
			}
		}
	}
}

func elements(t *testing.T, path string) int64 {
	t.Helper()
	r, f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	n := int64(0)
	for _, tensor := range f.Tensors {
		n += product(tensor.Dims)
	}
	return n
}
