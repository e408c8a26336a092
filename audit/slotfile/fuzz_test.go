package slotfile

import (
	"os"
	"path/filepath"
	"testing"
)

// seed is a slot file that a real llama-server 0.7.0 saved, three tokens long, and the shape it was saved with.
type seed struct {
	b     []byte
	shape Shape
}

// seeds by their names: the types of keys and values; flash attention on or off; streams, where there are several; rotated.
func seeds(t testing.TB) map[string]seed {
	t.Helper()
	paths, err := filepath.Glob("testdata/*.bin")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]seed{}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		name, shape := filepath.Base(path), demo
		if name == "q8-rotated.bin" {
			shape.HeadsKV = 1
		}
		all[name] = seed{b, shape}
	}
	if len(all) < 4 {
		t.Fatalf("%d seeds in testdata, want at least 4", len(all))
	}
	return all
}

func FuzzParse(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s.b, s.shape.Layers, s.shape.HeadsKV)
	}
	f.Fuzz(func(t *testing.T, b []byte, layers, heads int) {
		file, err := Parse(b, Shape{Layers: layers, HeadsKV: heads})
		if err != nil {
			return
		}
		s := file.Snapshot
		if err := s.Check(); err != nil || len(s.Layers) != layers || s.Tokens() == 0 || s.Positions == nil {
			t.Fatalf("a snapshot of %d layers and %d tokens that does not hold together: %v", len(s.Layers), s.Tokens(), err)
		}
		numbers := len(file.Tokens) + len(s.Positions)
		for _, l := range s.Layers {
			numbers += len(l.K.Data) + len(l.V.Data)
		}
		if numbers > len(b) {
			t.Errorf("%d numbers from a file of %d bytes", numbers, len(b))
		}
		for i := 1; i < s.Tokens(); i++ {
			if s.Position(i) <= s.Position(i-1) {
				t.Errorf("row %d has position %d after %d", i, s.Position(i), s.Position(i-1))
			}
		}
	})
}
