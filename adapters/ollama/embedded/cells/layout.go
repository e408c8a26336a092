package cells

import (
	"errors"
	"reflect"
	"unsafe"

	"github.com/ollama/ollama/kvcache"
	"github.com/ollama/ollama/ml"
)

// places are where the engine's bookkeeping lies: a slice of cells, in each of them a slice of sequences.
type places struct {
	cells, sequences, size uintptr
	known                  bool
}

var layout = find()

func find() (p places) {
	causal := reflect.TypeFor[kvcache.Causal]()
	cells, ok := causal.FieldByName("cells")
	if !ok || cells.Type.Kind() != reflect.Slice || cells.Type.Elem().Kind() != reflect.Struct {
		return p
	}
	cell := cells.Type.Elem()
	sequences, ok := cell.FieldByName("sequences")
	keys, found := causal.FieldByName("keys")
	p = places{cells.Offset, sequences.Offset, cell.Size(), true}
	p.known = ok && found && sequences.Type == reflect.TypeFor[[]int]() && keys.Type == reflect.TypeFor[map[int]ml.Tensor]()
	return p
}

func (p places) check() error {
	if !p.known {
		return errors.New("the caches of this Ollama are not laid out as kvshield knows them; build kvshield-ollama with the version in its go.mod")
	}
	return nil
}

// uses says of each cell whether a sequence uses it. The engine may be making the next graph meanwhile: of a cell that it
// takes or gives up at this moment, either answer will do.
func (p places) uses(c *kvcache.Causal) []bool {
	cells := *(*[]byte)(unsafe.Add(unsafe.Pointer(c), p.cells)) // its length counts cells, not bytes
	out := make([]bool, len(cells))
	if len(cells) == 0 {
		return out
	}
	first := unsafe.Pointer(unsafe.SliceData(cells))
	for i := range out {
		sequences := (*[]int)(unsafe.Add(first, uintptr(i)*p.size+p.sequences))
		out[i] = len(*sequences) > 0
	}
	return out
}
