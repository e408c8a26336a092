package vault

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/internal/gguf"
)

func permuted(name string) bool {
	return name == "rope_freqs.weight" || strings.Contains(name, "attn_q.") ||
		strings.Contains(name, "attn_k.") || strings.Contains(name, "attn_v.")
}

func TestOnlyAttentionChanges(t *testing.T) {
	for i, s := range samples {
		t.Run(s.String(), func(t *testing.T) {
			from := s.build(t, uint64(i))
			res, to := load(t, New(Options{}), from)
			want, got := contents(t, from), contents(t, to)
			for name, raw := range want {
				if same := bytes.Equal(got[name], raw); same == permuted(name) {
					t.Errorf("tensor %s: unchanged is %v", name, same)
				}
			}
			if _, ok := got["rope_freqs.weight"]; !ok {
				t.Error("no frequency factors in the shielded model")
			}
			if n := len(got) - len(want); n != 0 && (s.own || n != 1) {
				t.Errorf("%d tensors were added", n)
			}
			checkResult(t, s, res, from, to, got)
		})
	}
}

func checkResult(t *testing.T, s sample, res enclave.LoadResult, from, to []string, got map[string][]byte) {
	t.Helper()
	marker := got[res.Marker]
	if res.Marker != "rope_freqs.weight" || !bytes.Equal(res.Fingerprint, marker[:min(len(marker), 256)]) {
		t.Errorf("marker %q, fingerprint %x, want %x", res.Marker, res.Fingerprint, marker)
	}
	var changed, total int64
	for name, raw := range got {
		if permuted(name) {
			changed += int64(len(raw))
		}
	}
	for i, path := range from {
		info, _ := os.Stat(path)
		total += info.Size()
		if info, _ = os.Stat(to[i]); info.Size() != res.OutputSizes[i] {
			t.Errorf("output %d has %d bytes, want %d", i, info.Size(), res.OutputSizes[i])
		}
	}
	want := enclave.Model{Action: enclave.Shield, Architecture: "llama", Files: s.files, Layers: s.layers, Heads: s.heads,
		HeadsKV: s.kv, HeadDim: s.values, RowFloats: s.heads * s.values, Bytes: total, ShieldBytes: changed,
		RotaryDim: s.rot, RotaryBase: s.base, CacheFloats: int64(s.layers * s.kv * (s.dim + s.values))}
	if res.Model != want || res.ID == 0 {
		t.Errorf("number %d, model %+v, want %+v", res.ID, res.Model, want)
	}
}

func TestSplitsStayConsistent(t *testing.T) {
	for _, own := range []bool{false, true} {
		s := with(func(s *sample) { s.files, s.own = 3, own })
		_, to := load(t, New(Options{}), s.build(t, 1))
		total, stated := 0, uint64(0)
		for i, path := range to {
			r, f, err := gguf.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			r.Close()
			total += len(f.Tensors)
			if n, _, _ := f.Uint("split.tensors.count"); i == 0 || n == stated {
				stated = n
			}
		}
		if uint64(total) != stated {
			t.Errorf("own factors %v: %d tensors, the files say %d", own, total, stated)
		}
	}
}

// The copies and what the enclave writes make up the data without overlap.
func TestCopiesAreCoalescedAndSeparate(t *testing.T) {
	from := standard.build(t, 1)
	to := emptyFiles(t, 1)
	res, err := New(Options{}).Load(t.Context(), enclave.LoadRequest{Sources: from, Outputs: to})
	if err != nil {
		t.Fatal(err)
	}
	// One before the first layer, one between the layers, one after the last.
	if len(res.Copies) != 3 {
		t.Errorf("%d copies, want 3: %+v", len(res.Copies), res.Copies)
	}
	written, _ := os.ReadFile(to[0])
	end := int64(0)
	for _, c := range res.Copies {
		if c.To < end || c.Length <= 0 {
			t.Errorf("copy %+v starts before %d or is empty", c, end)
		}
		end = c.To + c.Length
		if !bytes.Equal(written[c.To:end], make([]byte, c.Length)) {
			t.Errorf("the enclave has written where %+v goes", c)
		}
	}
}

func TestEveryLoadDrawsAnew(t *testing.T) {
	v, from := New(Options{}), standard.build(t, 1)
	a, fileA := load(t, v, from)
	b, fileB := load(t, v, from)
	if a.ID == b.ID || bytes.Equal(a.Fingerprint, b.Fingerprint) {
		t.Error("two loads share their number or fingerprint")
	}
	const name = "blk.0.attn_v.weight"
	if bytes.Equal(contents(t, fileA)[name], contents(t, fileB)[name]) {
		t.Error("two loads have the same permutation")
	}
}

// A source of randomness that repeats itself once must not yield two models that look alike.
func TestFingerprintsAreUnique(t *testing.T) {
	key, other := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	v := New(Options{Random: bytes.NewReader(bytes.Join([][]byte{key, key, other, key}, nil))})
	from := standard.build(t, 1)
	a, _ := load(t, v, from)
	b, _ := load(t, v, from)
	if bytes.Equal(a.Fingerprint, b.Fingerprint) {
		t.Error("two loaded models have one fingerprint")
	}
	if err := v.Unload(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	if c, _ := load(t, v, from); !bytes.Equal(c.Fingerprint, a.Fingerprint) {
		t.Error("the fingerprint of an unloaded model is not free again")
	}
}

func TestOutOfFingerprints(t *testing.T) {
	v := New(Options{Random: repeat{}})
	from := standard.build(t, 1)
	load(t, v, from)
	_, err := v.Load(t.Context(), enclave.LoadRequest{Sources: from, Outputs: emptyFiles(t, 1)})
	var refused *enclave.RefusedError
	if !errors.As(err, &refused) || !strings.Contains(err.Error(), "unload some of them") {
		t.Errorf("error %v, want a RefusedError", err)
	}
}

type repeat struct{}

func (repeat) Read(b []byte) (int, error) { return len(b), nil }

func TestInspectAgreesWithLoad(t *testing.T) {
	v, from := New(Options{}), samples[len(samples)-1].build(t, 1)
	m, err := v.Inspect(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	if res, _ := load(t, v, from); res.Model != m {
		t.Errorf("Inspect says %+v, Load %+v", m, res.Model)
	}
}

func TestPassNeedsNoOutputs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "proj.gguf")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	var b gguf.Builder
	b.Key("general.architecture", "clip")
	if _, err := b.WriteTo(f); err != nil {
		t.Fatal(err)
	}
	f.Close()
	res, err := New(Options{}).Load(t.Context(), enclave.LoadRequest{Sources: []string{path}})
	if err != nil || res.Action != enclave.Pass || res.ID != 0 || res.Copies != nil {
		t.Errorf("result %+v, error %v", res, err)
	}
}

func TestBadSources(t *testing.T) {
	good := standard.build(t, 1)[0]
	raw, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name  string
		paths []string
		want  string
	}{
		{"none", nil, "at least one file"},
		{"missing", []string{filepath.Join(dir, "gone.gguf")}, "gone.gguf: no such file"},
		{"directory", []string{dir}, "not a regular file"},
		{"pipe", []string{fifo}, "fifo: "},
		{"empty", []string{file("empty", nil)}, "empty: "},
		{"magic", []string{file("magic", []byte("GGML and more bytes than a header has"))}, "not a GGUF file"},
		{"cut", []string{file("cut.gguf", raw[:len(raw)-100])}, "cut.gguf: GGUF file is cut short"},
		{"twice", []string{good, good}, "2 given"},
		{"order", reversed(with(func(s *sample) { s.files = 2 }).build(t, 1)), "name them in order"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := New(Options{})
			_, inspected := v.Inspect(t.Context(), tt.paths)
			_, loaded := v.Load(t.Context(), enclave.LoadRequest{Sources: tt.paths, Outputs: emptyFiles(t, len(tt.paths))})
			for _, err := range []error{inspected, loaded} {
				var invalid *enclave.InvalidError
				if !errors.As(err, &invalid) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want an InvalidError with %q", err, tt.want)
				}
				if err != nil && strings.Contains(err.Error(), dir+"/") {
					t.Errorf("the message names a whole path: %v", err)
				}
			}
		})
	}
}

func reversed(paths []string) []string { return []string{paths[1], paths[0]} }

func TestBadOutputs(t *testing.T) {
	from := with(func(s *sample) { s.files = 2 }).build(t, 1)
	empty := emptyFiles(t, 2)
	tests := []struct {
		name  string
		paths []string
		want  string
	}{
		{"too few", empty[:1], "1 outputs for a model of 2 files"},
		{"missing", []string{empty[0], empty[1] + "x"}, "output 1 cannot be opened"},
		{"not empty", []string{empty[0], from[1]}, "output 1 is not an empty file"},
		{"the same", []string{empty[0], empty[0]}, "outputs 0 and 1 are the same file"},
	}
	before, _ := os.ReadFile(from[1])
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := New(Options{}).Load(t.Context(), enclave.LoadRequest{Sources: from, Outputs: tt.paths})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
	if after, _ := os.ReadFile(from[1]); !bytes.Equal(before, after) {
		t.Error("a source was written to")
	}
}

func TestFailureLeavesOutputsEmpty(t *testing.T) {
	from := standard.build(t, 1)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	t.Run("cancelled", func(t *testing.T) {
		v, to := New(Options{}), emptyFiles(t, 1)
		_, err := v.Load(cancelled, enclave.LoadRequest{Sources: from, Outputs: to})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v, want %v", err, context.Canceled)
		}
		if info, _ := os.Stat(to[0]); info.Size() != 0 || len(v.prints) != 0 {
			t.Errorf("the output has %d bytes, %d fingerprints are taken", info.Size(), len(v.prints))
		}
	})
	t.Run("no randomness", func(t *testing.T) {
		broken := errors.New("broken")
		_, err := New(Options{Random: iotest.ErrReader(broken)}).Load(t.Context(), enclave.LoadRequest{Sources: from, Outputs: emptyFiles(t, 1)})
		if !errors.Is(err, broken) {
			t.Errorf("error %v, want %v", err, broken)
		}
	})
}
