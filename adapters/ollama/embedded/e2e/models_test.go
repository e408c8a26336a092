package e2e

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ollama/ollama/fs/ggml"
)

// way is how a model is run: by which of Ollama's engines.
type way struct {
	model string
	env   []string
	says  string // what the server says of its runner
	// Prompts after which the stock engine's two best tokens stay furthest apart, of some hundred tried: at least 0.04 in
	// log-probability; after the first two in a small context as well. Closer ties fall either way, for stock too.
	prompts []string
}

var (
	forDemo   = []string{"From the war", "Under the war", "In the war", "From the state"}
	forQwen3  = []string{"Under the house", "My own people", "When the ship", "My own king"}
	forGemma3 = []string{"From the sea", "Our night", "My own house", "When the people"}
)

var ways = map[string]way{
	"llama.cpp":               {"demo", nil, "runner --model", []string{"In the war", "Under the land", "Our sea", "In the people"}},
	"Ollama's engine":         {"demo", []string{"OLLAMA_NEW_ENGINE=1"}, "runner --ollama-engine --model", forDemo},
	"Ollama's engine, flash":  {"demo", []string{"OLLAMA_NEW_ENGINE=1", "OLLAMA_FLASH_ATTENTION=1"}, "enabling flash attention", forDemo},
	"Ollama's engine, qwen3":  {"qwen3", nil, "runner --ollama-engine --model", forQwen3},
	"Ollama's engine, gemma3": {"gemma3", nil, "runner --ollama-engine --model", forGemma3},
}

// inEachWay runs a test with both engines, in every mode that shields.
func inEachWay(t *testing.T, f func(t *testing.T, w way, mode string)) {
	t.Helper()
	for name, w := range ways {
		t.Run(name, func(t *testing.T) {
			inEachMode(t, func(t *testing.T, mode string) { f(t, w, mode) })
		})
	}
}

const layers = 7 // the sixth of gemma3's layers is the first without a window

// createModels has kvshield-ollama import the models that the tests use: the demo model, and disguises of it.
func createModels() error {
	qwen3, err := disguise("qwen3", map[string]float32{"attn_q_norm": 1, "attn_k_norm": 1}, nil)
	if err != nil {
		return err
	}
	// Its embeddings are multiplied by 11; what the layers add must not drown in that.
	gemma3, err := disguise("gemma3", map[string]float32{"attn_q_norm": 1, "attn_k_norm": 1, "post_attention_norm": 12, "post_ffw_norm": 12},
		map[string]any{"attention.sliding_window": uint32(16)})
	if err != nil {
		return err
	}
	recurrent, err := disguise("llama", map[string]float32{"ssm_conv1d": 1}, nil)
	if err != nil {
		return err
	}
	s, err := launch(shielded, nil)
	if err != nil {
		return err
	}
	defer s.stop()
	for name, path := range map[string]string{"demo": demoModel, "qwen3": qwen3, "gemma3": gemma3, "recurrent": recurrent} {
		if err := s.create(name, path); err != nil {
			return fmt.Errorf("%w\n%s", err, s.log)
		}
	}
	return nil
}

// create imports a model, with settings that make its answers repeatable.
func (s *server) create(name, path string) error {
	return s.importModel(name, path, `TEMPLATE """{{ if .System }}{{ .System }} {{ end }}{{ .Prompt }}"""
PARAMETER temperature 0
PARAMETER seed 1
PARAMETER num_thread 1
PARAMETER num_predict 64
`)
}

func (s *server) importModel(name, path, settings string) error {
	file := filepath.Join(home, name+".Modelfile")
	text := "FROM " + path + "\n" + settings
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return err
	}
	_, err := s.command("create", name, "-f", file)
	return err
}

// disguise makes a model of another architecture from the demo model's weights. It talks nonsense, but is sure of it, as a model
// of random weights is not.
func disguise(architecture string, norms map[string]float32, keys map[string]any) (string, error) {
	src, err := os.Open(demoModel)
	if err != nil {
		return "", err
	}
	defer src.Close()
	demo, err := ggml.Decode(src, -1)
	if err != nil {
		return "", err
	}
	own := demo.KV()
	width := own.Uint("embedding_length")
	head := width / own.Uint("attention.head_count")
	kv := ggml.KV{}
	for key := range own.Keys() {
		kv[strings.Replace(key, "llama.", architecture+".", 1)] = own.Value(key)
	}
	kv["general.architecture"] = architecture
	kv["tokenizer.ggml.eos_token_id"] = uint32(0) // the unknown token, so that answers are as long as they are asked to be
	kv[architecture+".block_count"] = uint32(layers)
	kv[architecture+".attention.key_length"] = head
	kv[architecture+".attention.value_length"] = head
	for key, value := range keys {
		kv[architecture+"."+key] = value
	}

	var tensors []*ggml.Tensor
	add := func(name string, t *ggml.Tensor) {
		data := io.NewSectionReader(src, int64(demo.Tensors().Offset+t.Offset), int64(t.Size()))
		tensors = append(tensors, &ggml.Tensor{Name: name, Kind: t.Kind, Shape: t.Shape, WriterTo: part{data}})
	}
	for _, t := range demo.Tensors().Items() {
		if !strings.HasPrefix(t.Name, "blk.") {
			add(t.Name, t)
		}
	}
	for layer := range layers {
		from := fmt.Sprintf("blk.%d.", layer%int(own.Uint("block_count")))
		for _, t := range demo.Tensors().Items(from) {
			add(fmt.Sprintf("blk.%d.%s", layer, strings.TrimPrefix(t.Name, from)), t)
		}
		for name, value := range norms {
			n := width
			if strings.HasPrefix(name, "attn_") {
				n = head
			}
			tensors = append(tensors, &ggml.Tensor{Name: fmt.Sprintf("blk.%d.%s.weight", layer, name), Shape: []uint64{uint64(n)}, WriterTo: constant{n, value}})
		}
	}
	path := filepath.Join(home, architecture+".gguf")
	out, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer out.Close()
	return path, ggml.WriteGGUF(out, kv, tensors)
}

// part is a tensor's data in another file.
type part struct{ r *io.SectionReader }

func (p part) WriteTo(w io.Writer) (int64, error) { return io.Copy(w, p.r) }

// constant is an F32 vector of equal numbers.
type constant struct {
	n     uint32
	value float32
}

func (c constant) WriteTo(w io.Writer) (int64, error) {
	return 4 * int64(c.n), binary.Write(w, binary.LittleEndian, slices.Repeat([]float32{c.value}, int(c.n)))
}
