package tinymodel

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMakeOne(t *testing.T) {
	name := os.Getenv("TINY")
	if name == "" {
		t.Skip()
	}
	root, _ := filepath.Abs("../..")
	e, err := Open(t.TempDir(), filepath.Join(root, ".engine"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := e.Discover(t.TempDir(), Start(name))
	if err == nil {
		err = r.Write("/tmp/p/" + name + ".gguf")
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range r.Order {
		t.Log(k, r.Keys[k])
	}
	for _, x := range r.Tensors[:min(40, len(r.Tensors))] {
		t.Log(x)
	}
}
