package e2e

import (
	"bytes"
	"encoding/binary"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Shape of the demo model's cache.
const (
	layers   = 5
	kvHeads  = 2
	headDim  = 32
	rowBytes = kvHeads * headDim * 2 // F16
)

// column is one dimension of a cached key or value over all cached tokens.
type column []float64

// cache is what a slot file holds for one layer: the columns of its keys and of its values.
type cache struct{ keys, values []column }

// cached saves a slot after a greedy answer and reads the keys and values from the file.
func (s *server) cached(t *testing.T, dir string) []cache {
	t.Helper()
	s.complete(t, prompts[0], 40, map[string]any{"cache_prompt": true, "id_slot": 0})
	if _, err := s.post("/slots/0?action=save", map[string]any{"filename": "slot.bin"}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "slot.bin"))
	if err != nil {
		t.Fatal(err)
	}
	return parseSlot(t, b)
}

// parseSlot finds the matrices of a slot file by what precedes each: its type (1 is F16) and the bytes of a row.
func parseSlot(t *testing.T, b []byte) []cache {
	t.Helper()
	tokens := int(binary.LittleEndian.Uint32(b[0x14:]))
	header := binary.LittleEndian.AppendUint64([]byte{1, 0, 0, 0}, rowBytes)
	matrix := func() []column {
		at := bytes.Index(b, header)
		if at < 0 || len(b) < at+len(header)+tokens*rowBytes {
			t.Fatalf("the slot file has no further matrix of %d tokens", tokens)
		}
		columns := make([]column, rowBytes/2)
		data := b[at+len(header):]
		for i := range tokens * rowBytes / 2 {
			columns[i%len(columns)] = append(columns[i%len(columns)], half(binary.LittleEndian.Uint16(data[2*i:])))
		}
		b = data[tokens*rowBytes:]
		return columns
	}
	var out []cache
	for range layers {
		out = append(out, cache{keys: matrix()})
	}
	for i := range out {
		out[i].values = matrix()
	}
	return out
}

// half widens an F16 that is neither infinite nor NaN.
func half(h uint16) float64 {
	exponent, fraction := int(h>>10&31), float64(h&1023)
	v := math.Ldexp(1024+fraction, exponent-25)
	if exponent == 0 {
		v = math.Ldexp(fraction, -24)
	}
	if h>>15 != 0 {
		return -v
	}
	return v
}

// away is the relative distance of two columns.
func away(a, b column) float64 {
	var d, size float64
	for i := range a {
		d += (a[i] - b[i]) * (a[i] - b[i])
		size += a[i] * a[i]
	}
	return math.Sqrt(d / max(size, 1e-12))
}

// checkPermuted finds, for every shielded column, the one stock column that it equals, and checks that this is a
// permutation which keeps heads together and moves most columns.
func checkPermuted(t *testing.T, what string, layer int, stock, shielded []column) {
	t.Helper()
	const near = 0.02 // F16 rounding, carried through the layers below
	used := map[int]bool{}
	heads := map[int]int{}
	moved := 0
	for i, c := range shielded {
		best := 0
		for j := range stock {
			if away(stock[j], c) < away(stock[best], c) {
				best = j
			}
		}
		if d := away(stock[best], c); d > near || used[best] {
			t.Fatalf("layer %d: %s column %d equals no stock column of its own (nearest %d, %.3f away)", layer, what, i, best, d)
		}
		used[best] = true
		if from, known := heads[i/headDim]; known && from != best/headDim {
			t.Fatalf("layer %d: %s head %d has columns of two heads", layer, what, i/headDim)
		}
		heads[i/headDim] = best / headDim
		if best != i {
			moved++
		}
	}
	if moved < len(stock)/2 {
		t.Errorf("layer %d: only %d of %d %s columns are elsewhere than in the stock cache", layer, moved, len(stock), what)
	}
}

// slotFiles allows what is refused unless it is asked for.
var slotFiles = []string{"--allow", "slot-save,slot-restore"}

// The cache of a shielded engine equals the stock one after a permutation, and not before.
func TestCacheIsPermuted(t *testing.T) {
	stockDir, shieldedDir := t.TempDir(), t.TempDir()
	args := []string{"-np", "1", "-c", "512", "-fa", "on", "--slot-save-path"}
	stock := startStock(t, demoModel, nil, append(args, stockDir+"/")...).cached(t, stockDir)
	shielded := startShielded(t, serveOptions{model: demoModel, mode: "permute", flags: slotFiles, args: append(args, shieldedDir+"/")}).cached(t, shieldedDir)
	for l := range stock {
		checkPermuted(t, "value", l, stock[l].values, shielded[l].values)
		checkPermuted(t, "key", l, stock[l].keys, shielded[l].keys)
	}
}

// A slot file is worth something only to the process that saved it: under another key it would be read wrongly.
func TestSlotFileOfAnotherLoadIsRefused(t *testing.T) {
	dir := t.TempDir()
	o := serveOptions{model: demoModel, mode: "permute", flags: slotFiles, args: []string{"-np", "1", "--slot-save-path", dir + "/"}}
	restore := map[string]any{"filename": "slot.bin"}
	first := startShielded(t, o)
	want := first.complete(t, prompts[0], 40, map[string]any{"cache_prompt": true, "id_slot": 0})
	if _, err := first.post("/slots/0?action=save", restore); err != nil {
		t.Fatal(err)
	}
	if _, err := first.post("/slots/0?action=restore", restore); err != nil {
		t.Errorf("its own slot file: %v", err)
	}
	if got := first.complete(t, prompts[0], 40, map[string]any{"cache_prompt": true, "id_slot": 0}); got.Content != want.Content {
		t.Errorf("after restoring: %q, want %q", got.Content, want.Content)
	}
	second := startShielded(t, serveOptions{model: demoModel, mode: "permute", args: o.args, flags: append([]string{"-v"}, slotFiles...)})
	if answer, err := second.post("/slots/0?action=restore", restore); err == nil {
		t.Errorf("another load restored the file: %s", answer)
	}
	if want := "a shielded cache can be restored only by the process that saved it"; !strings.Contains(second.log.String(), want) {
		t.Errorf("nobody says %q", want)
	}
	if got := second.complete(t, prompts[0], 40, map[string]any{"cache_prompt": true, "id_slot": 0}); got.Content != want.Content {
		t.Errorf("after the refusal: %q, want %q", got.Content, want.Content)
	}
}
