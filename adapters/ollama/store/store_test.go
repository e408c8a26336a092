package store

import (
	"os"
	"path/filepath"
	"testing"
)

func TestName(t *testing.T) {
	root := t.TempDir()
	blob := filepath.Join(root, "blobs", "sha256-12ab")
	for name, text := range map[string]string{
		"registry.ollama.ai/library/demo/latest": `{"layers":[{"digest":"sha256:12ab"}]}`,
		"registry.ollama.ai/someone/other/7b":    `{"layers":[{"digest":"sha256:34cd"}]}`,
		"example.org/someone/third/q4":           `{"layers":[{"digest":"sha256:56ef"}]}`,
		"registry.ollama.ai/library/broken/a":    `{"layers":[{`,
	} {
		path := filepath.Join(root, "manifests", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]string{
		blob:                                      "demo:latest",
		filepath.Join(root, "blobs/sha256-34cd"):  "someone/other:7b",
		filepath.Join(root, "blobs/sha256-56ef"):  "example.org/someone/third:q4",
		filepath.Join(root, "blobs/sha256-0000"):  "",
		filepath.Join(root, "models/sha256-12ab"): "",
	} {
		if got := Name(path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

func TestSame(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{{"demo", "demo:latest", true}, {"demo:7b", "demo", false}, {"example.org:80/a/demo", "example.org:80/a/demo:latest", true}} {
		if Same(c.a, c.b) != c.want {
			t.Errorf("%s, %s: want %v", c.a, c.b, c.want)
		}
	}
}

func TestListed(t *testing.T) {
	root := t.TempDir()
	blob := filepath.Join(root, "blobs", "sha256-12ab")
	manifest := filepath.Join(root, "manifests/registry.ollama.ai/library/demo/latest")
	file := filepath.Join(root, "model.gguf")
	link := filepath.Join(root, "link.gguf")
	for path, text := range map[string]string{manifest: `{"layers":[{"digest":"sha256:12ab"}]}`, file: "GGUF"} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		list []string
		path string
		want bool
	}{
		{[]string{"other", "demo"}, blob, true}, {[]string{"demo:latest"}, blob, true}, {[]string{"demo:7b"}, blob, false},
		{[]string{file}, file, true}, {[]string{link}, file, true}, {[]string{file}, file + "2", false}, {nil, file, false}, {[]string{""}, blob, false},
	} {
		if Listed(c.list)(c.path) != c.want {
			t.Errorf("%q, %s: want %v", c.list, c.path, c.want)
		}
	}
}
