package gguf_test

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/kvshield/kvshield/internal/gguf"
)

// addSeeds seeds a fuzz target with the header of the demo model, a file with every type, and every
// hostile file. tail is how many zero
// bytes of data follow, below 16 MiB.
func addSeeds(f *testing.F) {
	f.Helper()
	seeds := map[string]int{}
	add := func(kind string, header []byte, tail uint32) {
		f.Add(header, tail)
		seeds[kind]++
	}
	model, err := os.ReadFile(demo)
	if err != nil {
		f.Fatal(err)
	}
	parsed, err := gguf.Parse(bytes.NewReader(model), int64(len(model)))
	if err != nil {
		f.Fatal(err)
	}
	add("model", model[:parsed.DataOffset], uint32(parsed.Size-parsed.DataOffset))
	add("small", small(f), 0)
	for _, h := range hostileFiles() {
		add("hostile", h.file.Bytes(), 1024)
	}
	if seeds["model"] == 0 || seeds["small"] == 0 || seeds["hostile"] < 50 {
		f.Fatalf("the seed corpus is too small: %v", seeds)
	}
}

func FuzzParse(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, header []byte, tail uint32) {
		r := filled{header, int64(len(header)) + int64(tail%(16<<20))}
		file, err := gguf.Parse(r, r.size)
		if err != nil {
			checkTyped(t, err, r.size)
			return
		}
		checkInside(t, file)
		for _, key := range file.Keys() {
			_, _, err1 := file.Uint(key)
			_, _, err2 := file.Float(key)
			_, _, err3 := file.Text(key)
			_, _, err4 := file.Bool(key)
			_, found, err5 := file.Uints(r, key)
			if !found {
				t.Errorf("key %q is listed and not found", key)
			}
			for _, err := range []error{err1, err2, err3, err4, err5} {
				if err != nil {
					checkTyped(t, err, r.size)
				}
			}
		}
	})
}

func checkTyped(t *testing.T, err error, size int64) {
	t.Helper()
	var typed *gguf.Error
	if !errors.As(err, &typed) || typed.What == "" || typed.Offset < 0 || typed.Offset > size {
		t.Errorf("untyped or misplaced error in a file of %d bytes: %v", size, err)
	}
}

// checkInside asserts what Parse promises of tensors, by other arithmetic than its own.
func checkInside(t *testing.T, f *gguf.File) {
	t.Helper()
	end := f.DataOffset
	if len(f.Tensors) > 0 && f.DataOffset%f.Alignment != 0 {
		t.Errorf("data at %d, alignment %d", f.DataOffset, f.Alignment)
	}
	for _, tensor := range f.Tensors {
		at := f.DataOffset + tensor.Offset
		if at < end || tensor.Offset%f.Alignment != 0 || tensor.Size <= 0 || tensor.Size > f.Size-at {
			t.Errorf("%v: at %d of %d, the last one ends at %d", tensor, at, f.Size, end)
		}
		if tensor.Size != tensor.Rows()*tensor.RowBytes() {
			t.Errorf("%v: %d rows of %d bytes", tensor, tensor.Rows(), tensor.RowBytes())
		}
		if got, ok := f.Tensor(tensor.Name); !ok || got.Offset != tensor.Offset {
			t.Errorf("%v is not found by its name", tensor)
		}
		end = at + tensor.Size
	}
}

// FuzzWriteHeader parses, encodes again, and expects the same bytes. Only the padding may differ:
// Parse does not ask for zeros there.
func FuzzWriteHeader(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, header []byte, tail uint32) {
		r := filled{header, int64(len(header)) + int64(tail%(16<<20))}
		file, err := gguf.Parse(r, r.size)
		if err != nil || file.DataOffset > 1<<20 {
			return
		}
		var out bytes.Buffer
		at, err := gguf.WriteHeader(&out, r, file, file.Tensors, nil)
		if err != nil {
			t.Fatalf("parsed and not written: %v", err)
		}
		want := make([]byte, file.DataOffset)
		if _, err := r.ReadAt(want, 0); err != nil {
			t.Fatal(err)
		}
		clear(want[gguf.HeaderEnd(file):])
		if at != file.DataOffset || !bytes.Equal(out.Bytes(), want) {
			t.Errorf("data at %d, expected at %d, header of %d bytes", at, file.DataOffset, out.Len())
		}
	})
}
