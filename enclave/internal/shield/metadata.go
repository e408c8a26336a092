package shield

import (
	"math"
	"slices"

	"github.com/kvshield/kvshield/enclave"
)

// metadata reads the keys of one architecture and keeps the first error, so that a caller asks for
// everything and looks once.
type metadata struct {
	file   File
	prefix string
	err    error
}

func (m *metadata) fail(err error) {
	if m.err == nil {
		m.err = err
	}
}

// bad keeps what the GGUF reader says about a value.
func (m *metadata) bad(err error) {
	if err != nil {
		m.fail(enclave.Invalid("%s: %v", m.file.Name, err))
	}
}

func (m *metadata) has(key string) bool {
	return slices.Contains(m.file.Keys(), m.prefix+key)
}

// count returns a number of things, or fallback when the key is absent.
func (m *metadata) count(key string, fallback int) int {
	n, found, err := m.file.Uint(m.prefix + key)
	m.bad(err)
	if !found {
		return fallback
	}
	return m.narrow(key, n)
}

func (m *metadata) narrow(key string, n uint64) int {
	if n > math.MaxInt32 {
		m.fail(enclave.Invalid("%s: key %q is %d, which is out of range", m.file.Name, m.prefix+key, n))
		return 0
	}
	return int(n)
}

// same returns a number that may be stated once or for every layer.
func (m *metadata) same(key string, fallback int) int {
	list, found, err := m.file.Uints(m.file.Data, m.prefix+key)
	m.bad(err)
	if !found || err != nil {
		return fallback
	}
	if len(list) == 0 {
		m.fail(enclave.Invalid("%s: key %q is an empty array", m.file.Name, m.prefix+key))
		return 0
	}
	for i, n := range list {
		if n != list[0] {
			m.fail(enclave.Refuse("layer %d has another %s than layer 0 (%d, %d), which mode permute does not support", i, key, n, list[0]))
		}
	}
	return m.narrow(key, list[0])
}

// perLayer returns a number for every layer, whether the file states it once or for each.
func (m *metadata) perLayer(key string, layers int64, fallback []int64) []int64 {
	list, found, err := m.file.Uints(m.file.Data, m.prefix+key)
	m.bad(err)
	if !found || err != nil || len(list) == 0 || layers > maxLayers {
		return fallback
	}
	out := make([]int64, layers)
	for i := range out {
		out[i] = int64(m.narrow(key, list[i%len(list)]))
	}
	return out
}

func (m *metadata) float(key string, fallback float64) float64 {
	x, found, err := m.file.Float(m.prefix + key)
	m.bad(err)
	if !found {
		return fallback
	}
	return x
}

func (m *metadata) text(key, fallback string) string {
	s, found, err := m.file.Text(m.prefix + key)
	m.bad(err)
	if !found {
		return fallback
	}
	return s
}

// shape reads the geometry of attention, with the defaults that engines have.
func (m *metadata) shape(arch architecture) Shape {
	s := Shape{Rope: arch.rope, FixedHeads: arch.fixedHeads, Layers: m.count("block_count", 0)}
	m.heads(&s)
	derived := 0
	if s.Heads > 0 {
		derived = m.count("embedding_length", 0) / s.Heads
	}
	s.KeyDim = m.count("attention.key_length", derived)
	s.ValueDim = m.count("attention.value_length", derived)
	m.alike("attention.key_length_swa", s.KeyDim)
	m.alike("attention.value_length_swa", s.ValueDim)
	if s.Rope != RopeNone {
		s.RotDim = m.count("rope.dimension_count", s.KeyDim)
		m.alike("rope.dimension_count_swa", s.RotDim)
		s.Base = float32(m.float("rope.freq_base", 10000))
	}
	if m.err == nil {
		m.fail(s.check())
	}
	return s
}

// heads reads how many heads each layer has.
func (m *metadata) heads(s *Shape) {
	list, _, err := m.file.Uints(m.file.Data, m.prefix+"attention.head_count")
	m.bad(err)
	kv, found, err := m.file.Uints(m.file.Data, m.prefix+"attention.head_count_kv")
	m.bad(err)
	if !found {
		kv = list
	}
	switch {
	case m.err != nil || s.Layers < 1:
		return // Shape.check says what is wrong
	case s.Layers > maxLayers:
		m.fail(enclave.Refuse("%d layers are more than mode permute supports", s.Layers))
		return
	}
	counts := make([]Counts, s.Layers)
	for i := range counts {
		counts[i] = Counts{m.ofLayer("attention.head_count", list, i), m.ofLayer("attention.head_count_kv", kv, i)}
		s.Heads, s.HeadsKV = max(s.Heads, counts[i].Heads), max(s.HeadsKV, counts[i].KV)
	}
	if slices.ContainsFunc(counts, func(n Counts) bool { return n != counts[0] }) {
		s.PerLayer = counts
	}
}

// ofLayer is a layer's number in a list with one for all layers or one for each.
func (m *metadata) ofLayer(key string, list []uint64, layer int) int {
	switch {
	case len(list) == 1:
		layer = 0
	case list == nil:
		return 0
	case layer >= len(list):
		m.fail(enclave.Invalid("%s: key %q is an array of %d, with nothing for layer %d", m.file.Name, m.prefix+key, len(list), layer))
		return 0
	}
	return m.narrow(key, list[layer])
}

// alike refuses a number for layers with a window that differs from the others'.
func (m *metadata) alike(key string, want int) {
	if n := m.count(key, want); n != want {
		m.fail(enclave.Refuse("key %q is %d, other layers have %d: layers that differ are not supported by mode permute", m.prefix+key, n, want))
	}
}

// oneRotation says whether all layers rotate alike, each pair by a frequency of its own. Linear scaling is a factor on the
// position and harms nothing; so is YaRN with a factor of one: it blends two equal angles.
func (m *metadata) oneRotation() bool {
	kind := m.text("rope.scaling.type", "linear")
	factor := m.float("rope.scaling.factor", m.float("rope.scale_linear", 0))
	yarn := kind == "yarn" || m.float("rope.scaling.yarn_ext_factor", 0) > 0
	switch {
	case m.has("rope.freq_base_swa"), yarn && factor != 0 && factor != 1:
		return false
	}
	return kind == "none" || kind == "linear" || kind == "yarn"
}
