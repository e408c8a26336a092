// Package cells finds out which cells of a KV cache Ollama's own engine has given up, which it tells nobody: what a conversation
// has cached stays where it is until another one overwrites it.
//
// Start with [Follow] before a model is made. [Caches.Look] then reads the engine's own bookkeeping, which is in fields that are not
// exported: the version of Ollama is pinned in go.mod, and a model is refused when a field is not what it was there.
package cells

import (
	"fmt"
	"log/slog"
	"reflect"
	"sync"
	"unsafe"

	"github.com/ollama/ollama/fs"
	"github.com/ollama/ollama/kvcache"
	"github.com/ollama/ollama/ml"
	"github.com/ollama/ollama/model"
)

//go:linkname models github.com/ollama/ollama/model.models
var models map[string]func(fs.Config) (model.Model, error)

// Caches are those of the model that was made last: a runner has one.
type Caches struct {
	mu   sync.Mutex
	list []*cache
}

// Follow notes the caches of every model that is made from now on.
func Follow() *Caches {
	c := &Caches{}
	for name, create := range models {
		models[name] = func(config fs.Config) (model.Model, error) {
			m, err := create(config)
			if err == nil {
				err = c.follow(m.Config().Cache)
			}
			return m, err
		}
	}
	return c
}

func (c *Caches) follow(engine kvcache.Cache) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list = nil
	return c.add(engine)
}

func (c *Caches) add(engine kvcache.Cache) error {
	switch engine := engine.(type) {
	case *kvcache.Causal:
		if err := layout.check(); err != nil {
			return err
		}
		c.list = append(c.list, &cache{engine: engine})
	case *kvcache.WrapperCache:
		inner, err := field[[]kvcache.Cache](reflect.ValueOf(engine), "caches")
		if err != nil {
			return err
		}
		for _, engine := range inner {
			if err := c.add(engine); err != nil {
				return err
			}
		}
	}
	return nil // another kind holds no cells; the hook refuses what holds a conversation otherwise
}

// Look calls wipe for each tensor of keys in whose cache cells have been given up, with a bit for each cell that must stay. It is
// for the moment before a graph is computed, while no other is.
//
// A cell is wiped when it was unused at two looks in a row. By then every graph that was made when it was in use has been
// computed: the engine makes one graph while it computes the one before, no more.
func (c *Caches) Look(wipe func(keys unsafe.Pointer, stay []uint32)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, one := range c.list {
		stay, wiped := one.look()
		if wiped == 0 {
			continue
		}
		for _, keys := range one.keys() {
			wipe(keys, stay)
		}
		slog.Debug("kvshield: cells that no conversation uses any more are wiped", "cells", wiped)
	}
}

// cache is one of the engine's, and what was seen of its cells at the last look.
type cache struct {
	engine *kvcache.Causal
	seen   []state
}

type state byte

const (
	clean state = iota // never used, or wiped
	used
	unused // for the first time
)

func (c *cache) look() (stay []uint32, wiped int) {
	cells := layout.uses(c.engine)
	if len(c.seen) != len(cells) {
		c.seen = make([]state, len(cells))
	}
	stay = make([]uint32, (len(cells)+31)/32)
	for i, inUse := range cells {
		switch {
		case inUse:
			c.seen[i] = used
		case c.seen[i] == used:
			c.seen[i] = unused
		case c.seen[i] == unused:
			c.seen[i] = clean
			wiped++
			continue
		}
		stay[i/32] |= 1 << (i % 32)
	}
	return stay, wiped
}

// keys are the engine's tensors, by their address in C.
func (c *cache) keys() []unsafe.Pointer {
	tensors, err := field[map[int]ml.Tensor](reflect.ValueOf(c.engine), "keys")
	if err != nil {
		return nil // layout.check has seen it
	}
	var out []unsafe.Pointer
	for _, t := range tensors {
		if v := reflect.ValueOf(t).Elem().FieldByName("t"); v.Kind() == reflect.Pointer {
			out = append(out, v.UnsafePointer())
		}
	}
	return out
}

// field reads a field of the struct that v points to.
func field[T any](v reflect.Value, name string) (T, error) {
	f := v.Elem().FieldByName(name)
	if !f.IsValid() || f.Type() != reflect.TypeFor[T]() {
		var none T
		return none, fmt.Errorf("the caches of this Ollama have no %q as kvshield knows it", name)
	}
	return *(*T)(unsafe.Pointer(f.UnsafeAddr())), nil
}
