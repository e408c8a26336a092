package tinymodel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// What an engine says when a file lacks something (llama.cpp's model loader).
var (
	missingKey    = regexp.MustCompile(`(array )?key not found in model: (\S+)`)
	wrongType     = regexp.MustCompile(`key (\S+) has wrong type \S+ but expected type (\S+)`)
	wrongLength   = regexp.MustCompile(`key (\S+) has wrong array length; expected (\d+)`)
	missingTensor = regexp.MustCompile(`tensor '([^']+)' not found`)
	wrongShape    = regexp.MustCompile(`tensor '([^']+)' has wrong shape; expected ([\d, ]+), got`)
	complaint     = regexp.MustCompile(`error loading model[^:]*: (.*)`)
	layerNumber   = regexp.MustCompile(`\.\d+\.`)
)

// ErrNotMade means that no tiny model could be made of an architecture; the error says what the engine wants.
var ErrNotMade = errors.New("no tiny model")

// Discover finds a recipe by loading ever more complete files with the engine. dir is for scratch files. With ErrNotMade comes
// how far it got.
func (e *Engine) Discover(dir string, start Recipe) (*Recipe, error) {
	path := filepath.Join(dir, strings.ReplaceAll(start.Architecture, "/", "_")+".probe.gguf")
	defer os.Remove(path)
	d := discovery{r: &start, known: map[string][]int64{}}
	for _, t := range start.Tensors {
		d.known[layerNumber.ReplaceAllString(t.Name, ".N.")] = t.Dims
	}
	for range 20 { // an engine that aborts over a file is started again
		done, err := e.try(path, &d)
		if done || err != nil {
			return d.r, err
		}
	}
	return d.r, fmt.Errorf("%w of %s: no end of what is missing", ErrNotMade, start.Architecture)
}

// try goes on until the model loads, the engine ends, or nothing helps.
func (e *Engine) try(path string, d *discovery) (done bool, err error) {
	s, err := e.start()
	if err != nil {
		return false, err
	}
	defer s.close()
	for range 4000 {
		if err := d.r.write(path, false); err != nil {
			return false, err
		}
		log, ok, err := s.load(path)
		if ok {
			return true, nil
		}
		if !d.mend(log) {
			return false, fmt.Errorf("%w of %s: %s", ErrNotMade, d.r.Architecture, d.reason(log))
		}
		if err != nil {
			return false, nil
		}
	}
	return false, fmt.Errorf("%w of %s: no end of what is missing", ErrNotMade, d.r.Architecture)
}

type discovery struct {
	r     *Recipe
	known map[string][]int64 // shapes, by name without the layer's number
	last  string
}

func (d *discovery) reason(log string) string {
	if m := complaint.FindStringSubmatch(log); m != nil {
		return m[1]
	}
	lines := strings.Split(strings.TrimSpace(log), "\n")
	for _, line := range lines {
		if strings.Contains(line, "ASSERT") {
			return line
		}
	}
	return strings.Join(lines[max(0, len(lines)-3):], " | ")
}

// mend adds what the log says is missing. It is false when nothing is, or the same again.
func (d *discovery) mend(log string) bool {
	said := d.reason(log)
	if said == d.last {
		return false
	}
	d.last = said
	prefix := d.r.Architecture + "."
	switch {
	case missingKey.MatchString(log):
		m := missingKey.FindStringSubmatch(log)
		key := strings.TrimPrefix(m[2], prefix)
		value, ok := defaults[key]
		if m[1] != "" && key == "attention.sliding_window_pattern" {
			value, ok = alternating(int(d.r.Keys["block_count"].(uint32))), true
		}
		if ok {
			d.r.set(key, value)
		}
		return ok
	case wrongType.MatchString(log):
		m := wrongType.FindStringSubmatch(log)
		key := strings.TrimPrefix(m[1], prefix)
		value, ok := retyped(d.r.Keys[key], m[2])
		if ok {
			d.r.set(key, value)
		}
		return ok
	case wrongLength.MatchString(log):
		m := wrongLength.FindStringSubmatch(log)
		n, _ := strconv.Atoi(m[2])
		key := strings.TrimPrefix(m[1], prefix)
		d.r.set(key, lengthened(d.r.Keys[key], n))
		return true
	case d.hint(said):
		return true
	case wrongShape.MatchString(log):
		m := wrongShape.FindStringSubmatch(log)
		return d.shape(m[1], m[2])
	case missingTensor.MatchString(log):
		name := missingTensor.FindStringSubmatch(log)[1]
		dims := d.known[layerNumber.ReplaceAllString(name, ".N.")]
		if dims == nil {
			dims = []int64{1}
		}
		d.r.Tensors = append(d.r.Tensors, Tensor{name, dims})
		return true
	}
	return false
}

// hint sets the keys that an engine wants without naming them.
func (d *discovery) hint(said string) bool {
	for _, h := range hints {
		if !h.says.MatchString(said) {
			continue
		}
		set := false
		for _, key := range h.keys {
			if d.r.Keys[key] == nil {
				d.r.set(key, defaults[key])
				set = true
			}
		}
		return set
	}
	return false
}

func (d *discovery) shape(name, list string) bool {
	var dims []int64
	for _, field := range strings.Split(list, ",") {
		n, err := strconv.ParseInt(strings.TrimSpace(field), 10, 64)
		if err != nil || n < 1 {
			return false
		}
		dims = append(dims, n)
	}
	for i := range d.r.Tensors {
		if d.r.Tensors[i].Name == name {
			d.r.Tensors[i].Dims = dims
			d.known[layerNumber.ReplaceAllString(name, ".N.")] = dims
			return true
		}
	}
	return false
}

// retyped is a number as the engine wants it.
func retyped(value any, kind string) (any, bool) {
	var x float64
	switch v := value.(type) {
	case uint32:
		x = float64(v)
	case float32:
		x = float64(v)
	case bool:
		if v {
			x = 1
		}
	default:
		return nil, false
	}
	switch kind {
	case "u32":
		return uint32(x), true
	case "i32":
		return int32(x), true
	case "f32":
		return float32(x), true
	case "bool":
		return x != 0, true
	case "arr":
		return []uint32{uint32(x), uint32(x)}, true
	}
	return nil, false
}

// alternating says which layers have a window: every other one.
func alternating(n int) []bool {
	out := make([]bool, n)
	for i := range out {
		out[i] = i%2 == 0
	}
	return out
}

func lengthened(value any, n int) any {
	switch v := value.(type) {
	case []float32:
		out := make([]float32, n)
		for i := range out {
			out[i] = v[i%len(v)]
		}
		return out
	case []uint32:
		out := make([]uint32, n)
		for i := range out {
			out[i] = v[i%len(v)]
		}
		return out
	}
	return value
}
