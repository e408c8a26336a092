package attention

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"testing"
)

var storages = []Storage{F16, F32, Q8_0}

func filled(t *testing.T, s Shape, cells int, seed uint64) (*layer, *Cache) {
	t.Helper()
	l := newLayer(s, 1, cells, seed)
	return l, l.cache(t, best())
}

// What is left in memory is what would be there had the other cells never been written.
func TestKeepZeroesCellsAndGivesBackPages(t *testing.T) {
	for _, storage := range storages {
		s := small
		s.Type = storage
		l, c := filled(t, s, 700, 1)
		keep := make([]uint32, (690+31)/32)
		want, _ := NewCache(s, 700)
		defer want.Close()
		for cell := range 700 {
			kept := cell < 5 || cell >= 695 || cell >= 512 && cell%3 == 0
			if kept && cell >= 5 && cell < 695 {
				keep[(cell-5)/32] |= 1 << ((cell - 5) % 32)
			}
			if kept {
				if err := want.Put(int64(cell), l.k[cell], l.v[cell]); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := c.Keep(5, 690, keep); err != nil {
			t.Fatal(err)
		}
		for i := range c.pages {
			if (c.pages[i] == nil) != (want.pages[i] == nil) || (c.table[i] == 0) != (want.pages[i] == nil) {
				t.Fatalf("%v: page %d is there: %t, table %#x", storage, i, c.pages[i] != nil, c.table[i])
			}
			if c.pages[i] != nil && !bytes.Equal(c.pages[i].mem, want.pages[i].mem) {
				t.Errorf("%v: page %d holds more than the cells kept", storage, i)
			}
		}
		for cell := range int64(700) {
			if c.Written(cell) != want.Written(cell) {
				t.Errorf("%v: cell %d written: %t", storage, cell, c.Written(cell))
			}
		}
	}
}

func TestKeepRejects(t *testing.T) {
	_, c := filled(t, small, 64, 2)
	tests := []struct {
		first, n int64
		words    int
		want     error
	}{
		{-1, 1, 1, ErrCell}, {0, -1, 0, ErrCell}, {0, 65, 3, ErrCell}, {64, 1, 1, ErrCell}, {math.MaxInt64, 2, 1, ErrCell},
		{1, math.MaxInt64, 1, ErrCell}, {0, 33, 1, ErrLength}, {0, 32, 2, ErrLength}, {64, 0, 0, nil}, {0, 0, 0, nil}, {0, 64, 2, nil},
	}
	for _, tt := range tests {
		if err := c.Keep(tt.first, tt.n, make([]uint32, tt.words)); !errors.Is(err, tt.want) {
			t.Errorf("Keep(%d, %d, %d words): %v, want %v", tt.first, tt.n, tt.words, err, tt.want)
		}
	}
	if c.Bytes() != 0 {
		t.Errorf("%d bytes are left when nothing is kept", c.Bytes())
	}
	c.Close()
	if err := c.Keep(0, 1, []uint32{0}); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestWrittenOutside(t *testing.T) {
	_, c := filled(t, small, 64, 2)
	for _, cell := range []int64{-1, math.MinInt64, 64, 4096, math.MaxInt64} {
		if c.Written(cell) {
			t.Errorf("cell %d is written", cell)
		}
	}
}

func TestCopyFrom(t *testing.T) {
	l, from := filled(t, small, 600, 3)
	if err := from.Keep(0, 300, make([]uint32, 10)); err != nil { // a hole: page 0 goes
		t.Fatal(err)
	}
	_, to := filled(t, small, 600, 4)
	if err := to.CopyFrom(from); err != nil {
		t.Fatal(err)
	}
	k, v := make([]float32, 80), make([]float32, 48)
	for cell := range int64(600) {
		if to.Written(cell) != (cell >= 300) {
			t.Fatalf("cell %d written: %t", cell, to.Written(cell))
		}
		if cell >= 300 {
			if err := to.Get(cell, k, v); err != nil {
				t.Fatal(err)
			}
			worst(t, k, doubles(l.k[cell]), 4.0/2048)
		}
	}
	if to.pages[0] != nil || !bytes.Equal(to.pages[1].mem, from.pages[1].mem) {
		t.Error("a page of the copy differs")
	}
	if err := to.CopyFrom(to); err != nil || !to.Written(599) {
		t.Errorf("copy to itself: %v", err)
	}
	other, _ := NewCache(small, 601)
	defer other.Close()
	if err := to.CopyFrom(other); !errors.Is(err, ErrShape) {
		t.Errorf("copy of another size: %v", err)
	}
	from.Close()
	if err := to.CopyFrom(from); !errors.Is(err, ErrClosed) {
		t.Errorf("copy of a closed cache: %v", err)
	}
}

func TestExportAndImport(t *testing.T) {
	for _, storage := range storages {
		for _, dims := range [][2]int{{40, 24}, {64, 64}, {1, 33}} {
			t.Run(fmt.Sprintf("%v/%v", storage, dims), func(t *testing.T) {
				s := Shape{4, 2, dims[0], dims[1], storage}
				_, from := filled(t, s, 300, 5)
				to, err := NewCache(s, 300)
				if err != nil {
					t.Fatal(err)
				}
				defer to.Close()
				raw := make([]byte, s.CellBytes())
				for cell := range int64(300) {
					if err := from.Export(cell, raw); err != nil {
						t.Fatal(err)
					}
					if err := to.Import(cell, raw); err != nil {
						t.Fatal(err)
					}
				}
				for i := range from.pages {
					if !bytes.Equal(from.pages[i].mem, to.pages[i].mem) {
						t.Errorf("page %d differs", i)
					}
				}
			})
		}
	}
}

func TestCellBytes(t *testing.T) {
	for storage, want := range map[Storage]int{F16: 2 * 2 * (40 + 24), F32: 4 * 2 * (40 + 24), Q8_0: 2 * (40 + 2*2 + 24 + 2)} {
		s := small
		s.Type = storage
		if got := s.CellBytes(); got != want {
			t.Errorf("%v: %d bytes, want %d", storage, got, want)
		}
	}
}

// The reserve is what a full cache takes, and no less.
func TestReserve(t *testing.T) {
	for _, storage := range storages {
		s := small
		s.Type = storage
		_, c := filled(t, s, 600, 6)
		got, err := Reserve(s, 600)
		if err != nil || got < c.Bytes() || got >= c.Bytes()+3*int64(os.Getpagesize()) {
			t.Errorf("%v: reserve of %d bytes for a cache of %d, error %v", storage, got, c.Bytes(), err)
		}
	}
	for _, cells := range []int{0, -1, MaxCells + 1} {
		if _, err := Reserve(small, cells); !errors.Is(err, ErrShape) {
			t.Errorf("%d cells: %v", cells, err)
		}
	}
	if _, err := Reserve(Shape{}, 1); !errors.Is(err, ErrShape) {
		t.Errorf("no shape: %v", err)
	}
}

func TestPutKeysLeavesTheValues(t *testing.T) {
	for _, storage := range storages {
		s := small
		s.Type = storage
		l, c := filled(t, s, 70, 7)
		want, _ := NewCache(s, 70)
		defer want.Close()
		for cell := range l.k {
			if err := want.Put(int64(cell), l.k[69-cell], l.v[cell]); err != nil {
				t.Fatal(err)
			}
			if err := c.PutKeys(int64(cell), l.k[69-cell]); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(c.pages[0].mem, want.pages[0].mem) {
			t.Errorf("%v: other bytes than Put writes", storage)
		}
		keys, all, values := make([]float32, 80), make([]float32, 80), make([]float32, 48)
		if c.Keys(3, keys) != nil || c.Get(3, all, values) != nil || fmt.Sprint(keys) != fmt.Sprint(all) {
			t.Errorf("%v: Keys and Get differ", storage)
		}
		keys[79] = float32(math.Inf(1))
		if err := c.PutKeys(3, keys); !errors.Is(err, ErrNotFinite) || c.Written(3) {
			t.Errorf("%v: infinite key: %v", storage, err)
		}
	}
}

func TestCellsReject(t *testing.T) {
	_, c := filled(t, small, 64, 8)
	if err := c.Keep(9, 1, []uint32{0}); err != nil {
		t.Fatal(err)
	}
	k, raw := make([]float32, 80), make([]byte, small.CellBytes())
	calls := map[string]func(cell int64, short int) error{
		"Keys":    func(cell int64, short int) error { return c.Keys(cell, k[short:]) },
		"PutKeys": func(cell int64, short int) error { return c.PutKeys(cell, k[short:]) },
		"Export":  func(cell int64, short int) error { return c.Export(cell, raw[short:]) },
		"Import":  func(cell int64, short int) error { return c.Import(cell, raw[short:]) },
	}
	for name, call := range calls {
		for _, cell := range []int64{-1, 64, math.MaxInt64} {
			if err := call(cell, 0); !errors.Is(err, ErrCell) {
				t.Errorf("%s of cell %d: %v", name, cell, err)
			}
		}
		if err := call(1, 1); !errors.Is(err, ErrLength) {
			t.Errorf("%s with a short slice: %v", name, err)
		}
		if name == "Import" {
			continue
		}
		if err := call(9, 0); !errors.Is(err, ErrUnwritten) {
			t.Errorf("%s of an unwritten cell: %v", name, err)
		}
	}
	c.Close()
	for name, call := range calls {
		if err := call(1, 0); !errors.Is(err, ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}
