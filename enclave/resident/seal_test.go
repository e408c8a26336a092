package resident

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/kvshield/kvshield/enclave"
)

// digestOf knows models 1 to 99.
func digestOf(id enclave.ModelID) ([32]byte, bool) {
	return [32]byte{31: byte(id)}, id > 0 && id < 100
}

func modelsOf(ids ...enclave.ModelID) func() []enclave.ModelID {
	return func() []enclave.ModelID { return ids }
}

// sealedScene has models and cells in a store.
func sealedScene(t testing.TB, storage enclave.Storage, models ...enclave.ModelID) *scene {
	s := newScene(t, demo, 21)
	s.store.(*store).r.digest = digestOf
	s.store = s.store.(*store).r.OpenStore(modelsOf(models...))
	s.layer.Storage = storage
	s.id = declare(t, s.store, s.layer)
	s.play(s.fill(20, enclave.MaskF16, 0), 0, 1, 1)
	return s
}

var savedCells = []int64{3, 0, 319, 619, 7}

// save seals a text, cells, an empty text, cells again, and the end.
func (s *scene) save() (header []byte, records [][]byte) {
	s.t.Helper()
	w, err := s.store.Sealer()
	if err != nil {
		s.t.Fatal(err)
	}
	add := func(record []byte, err error) {
		s.t.Helper()
		if err != nil {
			s.t.Fatal(err)
		}
		if string(record[:4]) != "dst:" {
			s.t.Fatal("the record was not appended")
		}
		records = append(records, record[4:])
	}
	add(w.Text([]byte("dst:"), []byte("tokens of a conversation")))
	add(w.Cells([]byte("dst:"), s.id, savedCells))
	add(w.Text([]byte("dst:"), nil))
	add(w.Cells([]byte("dst:"), s.id, savedCells[:2]))
	add(w.End([]byte("dst:")))
	return w.Header(), records
}

// restore opens records until one is refused.
func restore(st enclave.Store, header []byte, records [][]byte) (texts []string, whole bool, o enclave.Opener, err error) {
	o, err = st.Opener(header)
	if err != nil {
		return nil, false, nil, err
	}
	for _, record := range records {
		text, end, err := o.Check(nil, record)
		if err != nil {
			return texts, false, o, err
		}
		if text != nil {
			texts = append(texts, string(text))
		}
		whole = whole || end
	}
	return texts, whole, o, nil
}

func TestSealAndOpen(t *testing.T) {
	for _, storage := range []enclave.Storage{enclave.StorageF16, enclave.StorageF32, enclave.StorageQ8_0} {
		s := sealedScene(t, storage, 5, 9, 5)
		header, records := s.save()
		if len(header) != enclave.SealHeader || len(records[0]) != len("tokens of a conversation")+enclave.SealOverhead {
			t.Fatalf("header of %d bytes, record of %d", len(header), len(records[0]))
		}
		// Another engine of the same enclave, with one model more.
		other := s.store.(*store).r.OpenStore(modelsOf(9, 7, 5))
		layer := s.layer
		layer.Streams, layer.Cells = 1, 64
		id := declare(t, other, layer)
		texts, whole, o, err := restore(other, header, records)
		if err != nil || !whole || !slices.Equal(texts, []string{"tokens of a conversation", ""}) {
			t.Fatalf("texts %q, whole %t, error %v", texts, whole, err)
		}
		to := []int64{40, 41, 0, 63, 2}
		if err := o.Place(1, records[1], id, to); err != nil {
			t.Fatal(err)
		}
		restored := &scene{t: t, store: other, id: id, layer: layer}
		for i, cell := range to {
			k, v := restored.read(cell)
			if !slices.Equal(k, s.k[savedCells[i]]) || !slices.Equal(v, s.v[savedCells[i]]) {
				t.Errorf("storage %d: cell %d came back changed", storage, savedCells[i])
			}
		}
	}
}

func TestRecordsShowNothing(t *testing.T) {
	s := sealedScene(t, enclave.StorageF32, 1)
	header, records := s.save()
	other, again := s.save()
	if bytes.Equal(header, other) || bytes.Equal(records[0], again[0]) {
		t.Error("two states of the same cells are the same")
	}
	if bytes.Contains(records[0], []byte("tokens")) {
		t.Error("the text can be read")
	}
}

func TestChangedStatesAreRefused(t *testing.T) {
	s := sealedScene(t, enclave.StorageF16, 5)
	header, records := s.save()
	_, foreign := s.save()
	change := func(at int, to ...[]byte) [][]byte { return slices.Replace(slices.Clone(records), at, at+1, to...) }
	tests := map[string][][]byte{
		"swapped":                {records[1], records[0], records[2], records[3], records[4]},
		"swapped cells":          {records[0], records[3], records[2], records[1], records[4]},
		"one missing":            change(2),
		"first missing":          change(0),
		"repeated":               change(1, records[1], records[1]),
		"after the end":          change(4, records[4], records[4]),
		"text after the end":     change(4, records[4], records[0]),
		"of another state":       change(1, foreign[1]),
		"end of another state":   change(4, foreign[4]),
		"empty record":           change(0, nil),
		"longer":                 change(0, append(slices.Clone(records[0]), 0)),
		"two in one":             change(0, append(slices.Clone(records[0]), records[1]...)),
		"header only":            change(0, records[0][:16]),
		"length without payload": change(0, []byte("\x01\x00\x00\x00\xff\xff\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00................")),
	}
	for name, changed := range tests {
		if _, _, _, err := restore(s.store, header, changed); !errors.Is(err, enclave.ErrSealed) {
			t.Errorf("%s: error %v, want ErrSealed", name, err)
		}
	}
	if _, whole, _, err := restore(s.store, header, records[:4]); whole || err != nil {
		t.Errorf("without its end a state is whole: %t, error %v", whole, err)
	}
}

func TestEveryTruncationAndFlippedBit(t *testing.T) {
	s := sealedScene(t, enclave.StorageQ8_0, 5, 6)
	header, records := s.save()
	refused := func(header []byte, records [][]byte) bool {
		_, whole, _, err := restore(s.store, header, records)
		return !whole && errors.Is(err, enclave.ErrSealed)
	}
	for i, record := range records {
		changed := slices.Clone(records)
		for n := range record {
			changed[i] = record[:n]
			if !refused(header, changed) {
				t.Fatalf("record %d of %d bytes was opened", i, n)
			}
		}
		for bit := range len(record) * 8 {
			changed[i] = slices.Clone(record)
			changed[i][bit/8] ^= 1 << (bit % 8)
			if !refused(header, changed) {
				t.Fatalf("record %d was opened with bit %d changed", i, bit)
			}
		}
	}
	for n := range header {
		if !refused(header[:n], records) {
			t.Fatalf("a header of %d bytes was taken", n)
		}
	}
	for bit := range len(header) * 8 {
		changed := slices.Clone(header)
		changed[bit/8] ^= 1 << (bit % 8)
		if !refused(changed, records) {
			t.Fatalf("the header was taken with bit %d changed", bit)
		}
	}
}

func TestOtherModelsAndProcessesAreRefused(t *testing.T) {
	s := sealedScene(t, enclave.StorageF16, 5, 6)
	header, records := s.save()
	r := s.store.(*store).r
	for _, models := range [][]enclave.ModelID{{}, {5}, {6}, {7, 8}, {100, 101}, {0}} {
		if _, err := r.OpenStore(modelsOf(models...)).Opener(header); !errors.Is(err, enclave.ErrSealed) {
			t.Errorf("models %v: error %v, want ErrSealed", models, err)
		}
	}
	other := keeper(t, Options{Digest: digestOf}).OpenStore(modelsOf(5, 6))
	if _, _, _, err := restore(other, header, records); !errors.Is(err, enclave.ErrSealed) {
		t.Errorf("another process: error %v, want ErrSealed", err)
	}
	same := keeper(t, Options{Digest: digestOf, Random: repeat{}}).OpenStore(modelsOf(5, 6))
	twin := keeper(t, Options{Digest: digestOf, Random: repeat{}}).OpenStore(modelsOf(5, 6))
	w, err := same.Sealer()
	if err != nil {
		t.Fatal(err)
	}
	record, err := w.Text(nil, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := restore(twin, w.Header(), [][]byte{record}); err != nil {
		t.Errorf("the root key alone should make the difference: %v", err)
	}
}

type repeat struct{}

func (repeat) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 42
	}
	return len(b), nil
}

func TestSealerNeedsKnownModels(t *testing.T) {
	many := []enclave.ModelID{1, 2, 3, 4, 5, 6, 7, 8, 9}
	for _, models := range [][]enclave.ModelID{{}, {0}, {1, 100}, many} {
		if _, err := keeper(t, Options{Digest: digestOf}).OpenStore(modelsOf(models...)).Sealer(); err == nil {
			t.Errorf("models %v: a state could be sealed", models)
		}
	}
	if _, err := keeper(t, Options{}).OpenStore(modelsOf(1)).Sealer(); err == nil {
		t.Error("without digests a state could be sealed")
	}
	if _, err := keeper(t, Options{Digest: digestOf}).OpenStore(modelsOf(many[:8]...)).Sealer(); err != nil {
		t.Error(err)
	}
	if _, err := New(Options{Random: io.LimitReader(repeat{}, 31)}); err == nil {
		t.Error("a keeper without a key")
	}
	if _, err := keeper(t, Options{Digest: digestOf, Random: io.LimitReader(repeat{}, 40)}).OpenStore(modelsOf(1)).Sealer(); err == nil {
		t.Error("a state without an id")
	}
}

func TestSealerRejects(t *testing.T) {
	s := sealedScene(t, enclave.StorageF16, 5)
	w, err := s.store.Sealer()
	if err != nil {
		t.Fatal(err)
	}
	stranger := declare(t, s.store.(*store).r.OpenStore(noModels), demo)
	for name, call := range map[string]func() ([]byte, error){
		"unwritten cell":     func() ([]byte, error) { return w.Cells(nil, s.id, []int64{1, 20}) },
		"negative cell":      func() ([]byte, error) { return w.Cells(nil, s.id, []int64{-1}) },
		"cell past the end":  func() ([]byte, error) { return w.Cells(nil, s.id, []int64{900}) },
		"more than there is": func() ([]byte, error) { return w.Cells(nil, s.id, make([]int64, 901)) },
		"unknown layer":      func() ([]byte, error) { return w.Cells(nil, 99999, []int64{1}) },
		"another's layer":    func() ([]byte, error) { return w.Cells(nil, stranger, []int64{1}) },
	} {
		if record, err := call(); !errors.Is(err, enclave.ErrCache) || len(record) != 0 {
			t.Errorf("%s: %d bytes, error %v", name, len(record), err)
		}
	}
	if _, err := w.Cells(nil, s.id, nil); err != nil {
		t.Errorf("no cells: %v", err)
	}
	if _, err := w.End(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Text(nil, []byte("more")); err == nil {
		t.Error("a record after the end")
	}
	if _, err := w.End(nil); err == nil {
		t.Error("a second end")
	}
}

func TestPlaceRejects(t *testing.T) {
	s := sealedScene(t, enclave.StorageF16, 5)
	header, records := s.save()
	f32 := s.layer
	f32.Storage = enclave.StorageF32
	wide, few, swapped := s.layer, s.layer, s.layer
	wide.DimV, few.KVHeads, swapped.DimK, swapped.DimV = 25, 3, s.layer.DimV, s.layer.DimK // the last takes as many bytes
	ids := []enclave.CacheID{declare(t, s.store, f32), declare(t, s.store, wide), declare(t, s.store, few), declare(t, s.store, swapped)}
	_, _, o, err := restore(s.store, header, records[:3])
	if err != nil {
		t.Fatal(err)
	}
	flipped := slices.Clone(records[1])
	flipped[40] ^= 1
	stranger := declare(t, s.store.(*store).r.OpenStore(noModels), s.layer)
	tests := []struct {
		name   string
		number int
		record []byte
		id     enclave.CacheID
		cells  []int64
		want   error
	}{
		{"not checked yet", 3, records[3], s.id, savedCells[:2], enclave.ErrSealed},
		{"negative number", -1, records[1], s.id, savedCells, enclave.ErrSealed},
		{"a text", 0, records[0], s.id, savedCells, enclave.ErrSealed},
		{"another record", 1, records[3], s.id, savedCells[:2], enclave.ErrSealed},
		{"changed since", 1, flipped, s.id, savedCells, enclave.ErrSealed},
		{"cut since", 1, records[1][:60], s.id, savedCells, enclave.ErrSealed},
		{"other storage", 1, records[1], ids[0], savedCells, enclave.ErrCache},
		{"other dimension", 1, records[1], ids[1], savedCells, enclave.ErrCache},
		{"other heads", 1, records[1], ids[2], savedCells, enclave.ErrCache},
		{"keys for values", 1, records[1], ids[3], savedCells, enclave.ErrCache},
		{"fewer cells", 1, records[1], s.id, savedCells[:4], enclave.ErrCache},
		{"more cells", 1, records[1], s.id, append(savedCells, 1), enclave.ErrCache},
		{"cell past the end", 1, records[1], s.id, []int64{900, 0, 1, 2, 3}, enclave.ErrCache},
		{"another's layer", 1, records[1], stranger, savedCells, enclave.ErrCache},
		{"nothing wrong", 1, records[1], s.id, savedCells, nil},
	}
	for _, tt := range tests {
		if err := o.Place(tt.number, tt.record, tt.id, tt.cells); !errors.Is(err, tt.want) {
			t.Errorf("%s: error %v, want %v", tt.name, err, tt.want)
		}
	}
}

// After a refused record nothing more of the state is used.
func TestNothingIsPlacedOnceARecordWasRefused(t *testing.T) {
	s := sealedScene(t, enclave.StorageF16, 5)
	header, records := s.save()
	_, _, o, err := restore(s.store, header, [][]byte{records[0], records[1], records[3]})
	if !errors.Is(err, enclave.ErrSealed) {
		t.Fatal(err)
	}
	if _, _, err := o.Check(nil, records[2]); !errors.Is(err, enclave.ErrSealed) {
		t.Errorf("the right record after a wrong one: %v", err)
	}
	if err := o.Place(1, records[1], s.id, savedCells); !errors.Is(err, enclave.ErrSealed) {
		t.Errorf("placed after a wrong one: %v", err)
	}
}

func TestCheckAppendsText(t *testing.T) {
	s := sealedScene(t, enclave.StorageF16, 5)
	header, records := s.save()
	o, err := s.store.Opener(header)
	if err != nil {
		t.Fatal(err)
	}
	text, _, err := o.Check([]byte("before "), records[0])
	if err != nil || string(text) != "before tokens of a conversation" {
		t.Errorf("%q, %v", text, err)
	}
}

// Nothing of what was sealed or opened stays in the store's scratch memory.
func TestScratchIsZeroed(t *testing.T) {
	s := sealedScene(t, enclave.StorageF16, 5)
	header, records := s.save()
	if _, _, _, err := restore(s.store, header, records); err != nil {
		t.Fatal(err)
	}
	scratch := s.store.(*store).scratch
	if scratch == nil {
		t.Fatal("no scratch memory to look at")
	}
	if left := scratch.Bytes(); !bytes.Equal(left, make([]byte, len(left))) {
		t.Error("scratch memory is not zero")
	}
	big, err := s.store.(*store).secret(keepScratch + 1)
	if err != nil {
		t.Fatal(err)
	}
	s.store.(*store).done(big)
	if s.store.(*store).scratch != nil {
		t.Error("large scratch memory stays")
	}
}
