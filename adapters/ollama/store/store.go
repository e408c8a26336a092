// Package store looks into the folder in which Ollama keeps its models: blobs by digest, and manifests that name them.
//
// Start with [Name], or with [Listed] for a list of a user's. It reads a few small files and changes nothing.
package store

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const manifestMax = 1 << 20

// Name finds the name under which Ollama keeps a blob, empty where there is none: its manifests lie beside the folder of the
// blobs. Of several names it is one.
func Name(blob string) string {
	dir, file := filepath.Split(blob)
	if filepath.Base(dir) != "blobs" {
		return ""
	}
	manifests, _ := filepath.Glob(filepath.Join(filepath.Dir(filepath.Clean(dir)), "manifests", "*", "*", "*", "*"))
	for _, path := range manifests {
		if has(path, strings.Replace(file, "-", ":", 1)) {
			return displayed(path)
		}
	}
	return ""
}

func has(manifest, digest string) bool {
	if info, err := os.Stat(manifest); err != nil || !info.Mode().IsRegular() || info.Size() > manifestMax {
		return false
	}
	text, err := os.ReadFile(manifest)
	var m struct {
		Layers []struct{ Digest string }
	}
	if err != nil || json.Unmarshal(text, &m) != nil {
		return false
	}
	for _, l := range m.Layers {
		if l.Digest == digest {
			return true
		}
	}
	return false
}

// displayed is the name as Ollama prints it: host and namespace only where they are not the usual ones.
func displayed(manifest string) string {
	parts := strings.Split(manifest, "/")
	host, namespace, model, tag := parts[len(parts)-4], parts[len(parts)-3], parts[len(parts)-2], parts[len(parts)-1]
	switch {
	case host != "registry.ollama.ai":
		return host + "/" + namespace + "/" + model + ":" + tag
	case namespace != "library":
		return namespace + "/" + model + ":" + tag
	}
	return model + ":" + tag
}

// Same says whether two names are those of one model: without a tag, it is the latest.
func Same(a, b string) bool { return tagged(a) == tagged(b) }

func tagged(name string) string {
	if !strings.Contains(name[strings.LastIndexByte(name, '/')+1:], ":") {
		name += ":latest"
	}
	return name
}

// Listed makes of a user's list a function that says whether a model is on it: by its full path, or by the name that Ollama has
// for it.
func Listed(list []string) func(path string) bool {
	return func(path string) bool {
		name := Name(path)
		return slices.ContainsFunc(list, func(listed string) bool {
			if name != "" && Same(listed, name) {
				return true
			}
			absolute, err := filepath.Abs(listed)
			if err != nil {
				return false
			}
			if real, err := filepath.EvalSymlinks(absolute); err == nil {
				absolute = real
			}
			return absolute == path
		})
	}
}
