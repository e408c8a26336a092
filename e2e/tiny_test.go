package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kvshield/kvshield/internal/tinymodel"
)

var tinyEngine = sync.OnceValues(func() (*tinymodel.Engine, error) {
	return tinymodel.Open(buildDir, filepath.Join(root, ".engine"))
})

var recipes sync.Map // by name: what the engine said that it takes

// tryTiny writes a small model of an architecture, as far as it can be made: the error is a tinymodel.ErrNotMade.
func tryTiny(t *testing.T, name string) (model string, err error) {
	t.Helper()
	e, err := tinyEngine()
	if err != nil {
		t.Fatal(err)
	}
	ask, _ := recipes.LoadOrStore(name, sync.OnceValues(func() (*tinymodel.Recipe, error) {
		dir, err := os.MkdirTemp(buildDir, "recipe-")
		if err != nil {
			return nil, err
		}
		return e.Discover(dir, tinymodel.Start(name))
	}))
	r, made := ask.(func() (*tinymodel.Recipe, error))()
	if made != nil && !errors.Is(made, tinymodel.ErrNotMade) {
		t.Fatal(made)
	}
	model = filepath.Join(t.TempDir(), strings.ReplaceAll(name, ":", "-")+".gguf")
	if err := r.Write(model); err != nil {
		t.Fatal(err)
	}
	return model, made
}

// tiny writes a small model of an architecture.
func tiny(t *testing.T, name string) string {
	t.Helper()
	model, err := tryTiny(t, name)
	if err != nil {
		t.Fatal(err)
	}
	return model
}
