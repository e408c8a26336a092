package tinymodel

import (
	"path/filepath"
	"testing"
)

func TestEveryArchitectureIsMadeOrNamed(t *testing.T) {
	root, _ := filepath.Abs("../..")
	e, err := Open(t.TempDir(), filepath.Join(root, ".engine"))
	if err != nil {
		t.Fatal(err)
	}
	names, err := e.Architectures()
	if err != nil {
		t.Fatal(err)
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
}
