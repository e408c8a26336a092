package slotfile

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// Every prefix of the kept files is an error, and of the right kind once the magic number and version are there.
func TestTruncatedFiles(t *testing.T) {
	for name, seed := range seeds(t) {
		for n := range len(seed.b) {
			want := ErrTruncated
			if n < 8 {
				want = ErrNotSlotFile
			}
			if _, err := Parse(seed.b[:n], seed.shape); !errors.Is(err, want) {
				t.Fatalf("%s: the first %d of %d bytes: %v, want %v", name, n, len(seed.b), err, want)
			}
		}
	}
}

// Offsets in testdata/f16-off.bin: one stream, three tokens, values transposed.
const (
	atWords   = 8
	atPacked  = 12
	atCount   = 20
	atMedia   = 36
	atStreams = 40
	atCells   = 44
	atCell    = 48 // three of 12 bytes
	atTrans   = 84
	atLayers  = 88
	atRotK    = 92
	atKeys    = 100 // type, row size, rows of 128 bytes
	atValues  = atKeys + 5*(12+3*128)
)

func TestDamagedFiles(t *testing.T) {
	whole := seeds(t)["f16-off.bin"].b
	with := func(at int, v uint32) []byte {
		c := slices.Clone(whole)
		binary.LittleEndian.PutUint32(c[at:], v)
		return c
	}
	second := slices.Insert(with(atStreams, 2), len(whole), whole[atCells:]...)
	for _, c := range []struct {
		name  string
		b     []byte
		shape Shape
		want  error
	}{
		{"unharmed", whole, demo, nil},
		{"empty", nil, demo, ErrNotSlotFile},
		{"text", []byte("hello, this is no slot file"), demo, ErrNotSlotFile},
		{"another magic", with(0, 0x6767736e), demo, ErrNotSlotFile},
		{"version 3", with(4, 3), demo, ErrUnsupported},
		{"version 5", with(4, 5), demo, ErrUnsupported},
		{"too many words", with(atWords, 1<<32-1), demo, ErrTruncated},
		{"no words", with(atWords, 0), demo, ErrMalformed}, // the list is then read as streams
		{"another token list", with(atPacked+4, 2), demo, ErrUnsupported},
		{"more tokens than words", with(atCount, 4), demo, ErrMalformed},
		{"fewer than no tokens", with(atCount, 1<<31), demo, ErrMalformed},
		{"media", with(atMedia, 1), demo, ErrUnsupported},
		{"no stream", with(atStreams, 0), demo, ErrMalformed},
		{"very many streams", with(atStreams, 1<<32-1), demo, ErrMalformed},
		{"two streams with cells", second, demo, ErrUnsupported},
		{"very many cells", with(atCells, 1<<32-1), demo, ErrTruncated},
		{"one cell more", with(atCells, 4), demo, ErrUnsupported},
		{"no cells", with(atCells, 0), demo, ErrUnsupported}, // what they held is left over
		{"a position below 0", with(atCell, 1<<32-1), demo, ErrMalformed},
		{"a position twice", with(atCell, 2), demo, ErrMalformed},
		{"a cell of no sequence", with(atCell+4, 0), demo, ErrUnsupported},
		{"a cell of very many", with(atCell+4, 1<<32-1), demo, ErrUnsupported},
		{"an impossible sequence", with(atCell+8, 256), demo, ErrUnsupported},
		{"half transposed", with(atTrans, 2), demo, ErrMalformed},
		{"a layer less, as before a second cache", with(atLayers, 4), demo, ErrUnsupported},
		{"very many layers", with(atLayers, 1<<32-1), demo, ErrUnsupported},
		{"a rotation of 3", with(atRotK, 3), demo, ErrMalformed},
		{"a rotation wider than a row", with(atRotK, 128), demo, ErrMalformed},
		{"keys of Q4_0", with(atKeys, 2), demo, ErrUnsupported},
		{"keys of an unknown type", with(atKeys, 1<<32-1), demo, ErrUnsupported},
		{"rows of no bytes", with(atKeys+4, 0), demo, ErrMalformed},
		{"rows of half an element", with(atKeys+4, 127), demo, ErrMalformed},
		{"very long rows", with(atKeys+8, 1<<31), demo, ErrMalformed},
		{"transposed Q8_0", with(atValues, 8), demo, ErrUnsupported},
		{"elements of 4 bytes", with(atValues+4, 4), demo, ErrMalformed},
		{"values of no dimension", with(atValues+8, 0), demo, ErrMalformed},
		{"values of very many", with(atValues+8, 1<<32-1), demo, ErrMalformed},
		{"values of many", with(atValues+8, 1<<24), demo, ErrTruncated},
		{"something behind", append(slices.Clone(whole), 1, 2, 3), demo, ErrUnsupported},
		{"another model's layers", whole, Shape{Layers: 4, HeadsKV: 2}, ErrUnsupported},
		{"heads that do not divide", whole, Shape{Layers: 5, HeadsKV: 3}, ErrMalformed},
		{"no heads", whole, Shape{Layers: 5, HeadsKV: 0}, ErrUnsupported},
		{"no layers", whole, Shape{Layers: 0, HeadsKV: 2}, ErrUnsupported},
		{"no layers in the file either", with(atLayers, 0), Shape{Layers: 0, HeadsKV: 2}, ErrUnsupported},
		{"fewer than no layers", whole, Shape{Layers: -1, HeadsKV: 2}, ErrUnsupported},
	} {
		if _, err := Parse(c.b, c.shape); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

// Other programs save a plain list of tokens, without the server's header.
func TestPlainTokenList(t *testing.T) {
	whole := seeds(t)["f16-off.bin"].b
	want, err := Parse(whole, demo)
	if err != nil {
		t.Fatal(err)
	}
	plain := slices.Delete(slices.Clone(whole), atMedia, atMedia+4)
	plain = slices.Delete(plain, atPacked, atCount+4)
	binary.LittleEndian.PutUint32(plain[atWords:], 3)
	got, err := Parse(plain, demo)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got.Tokens, want.Tokens) {
		t.Errorf("tokens %v, want %v", got.Tokens, want.Tokens)
	}
}

// A cell's rows move with it when cells are not in the order of their positions.
func TestCellsOutOfOrder(t *testing.T) {
	whole := seeds(t)["f16-off.bin"].b
	want, err := Parse(whole, demo)
	if err != nil {
		t.Fatal(err)
	}
	b := slices.Clone(whole)
	order := []int{2, 0, 1} // of the cells' positions
	for i, p := range order {
		binary.LittleEndian.PutUint32(b[atCell+12*i:], uint32(p))
	}
	got, err := Parse(b, demo)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range order {
		for l, layer := range got.Snapshot.Layers {
			if !slices.Equal(layer.K.Row(p), want.Snapshot.Layers[l].K.Row(i)) || !slices.Equal(layer.V.Row(p), want.Snapshot.Layers[l].V.Row(i)) {
				t.Errorf("layer %d: row %d is not that of cell %d", l, p, i)
			}
		}
		if got.Snapshot.Position(i) != i {
			t.Errorf("row %d has position %d", i, got.Snapshot.Position(i))
		}
	}
}

func TestForeignFiles(t *testing.T) {
	dir := t.TempDir()
	pipe, session := filepath.Join(dir, "pipe"), filepath.Join(dir, "session.bin")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	completion := filepath.Join(filepath.Dir(program), "llama-completion")
	if out, err := exec.Command(completion, "-m", model, "-p", "The sea", "-n", "1", "-t", "1", "-no-cnv", "--prompt-cache", session).CombinedOutput(); err != nil {
		t.Fatalf("%v; run make engine\n%s", err, out)
	}
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{model, "slotfile.go", dir, pipe, session, empty} {
		if _, err := Read(path, demo); !errors.Is(err, ErrNotSlotFile) || !strings.Contains(err.Error(), path) {
			t.Errorf("%v, want %s and %v", err, path, ErrNotSlotFile)
		}
	}
	if _, err := Read(filepath.Join(dir, "missing"), demo); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
