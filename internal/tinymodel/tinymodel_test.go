package tinymodel

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// What cannot be made is logged with what the engine wants; it may be a few.
func TestMostArchitecturesAreMade(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	e, err := Open(t.TempDir(), filepath.Join(root, ".engine"))
	if err != nil {
		t.Fatal(err)
	}
	names, err := e.Architectures()
	if err != nil {
		t.Fatal(err)
	}
	if os.Getenv("KVSHIELD_ARCHITECTURES") != "all" { // an eighth of them is soon done
		names = slices.Collect(func(yield func(string) bool) {
			for i := 0; i < len(names) && yield(names[i]); i += 8 {
			}
		})
	}
	made := 0
	for _, name := range names {
		r, err := e.Discover(t.TempDir(), Start(name))
		if err != nil {
			t.Log(err)
			continue
		}
		made++
		t.Logf("%s: %d tensors made", name, len(r.Tensors))
	}
	t.Logf("%d of %d", made, len(names))
	if made < len(names)*3/4 {
		t.Errorf("tiny models of only %d of %d architectures", made, len(names))
	}
}
