package gguf_test

import (
	"bytes"
	"errors"
	"math"
	"runtime"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/internal/gguf"
)

type hostile struct {
	name string
	file *raw
	kind error
	says string
}

func text(s string) *raw {
	r := &raw{}
	r.WriteString(s)
	return r
}

func version(n uint32) *raw { return text("GGUF").u32(n).u64(0).u64(0).zeros(64) }

func key() *raw { return head(0, 1).str("k") }

func one(kind gguf.Type, dims ...uint64) *raw {
	return head(1, 0).tensor("w", kind, 0, dims...).pad().zeros(512)
}

func alignment(n uint32) *raw {
	return head(1, 1).str("general.alignment").u32(4).u32(n).tensor("w", gguf.F32, 0, 1).zeros(512)
}

func two(first, second uint64) *raw {
	return head(2, 0).tensor("one", gguf.F32, first, 16).tensor("two", gguf.F32, second, 16).pad().zeros(128)
}

func repeated(keys int, key string) *raw {
	r := head(0, uint64(keys))
	for range keys {
		r.str(key).u32(0)
		r.WriteByte(1)
	}
	return r
}

func hostileFiles() []hostile {
	return append(append(hostileHeaders(), hostileKeys()...), hostileTensors()...)
}

func hostileHeaders() []hostile {
	return []hostile{
		{"empty", text(""), gguf.ErrTruncated, "empty"},
		{"part of the magic", text("GG"), gguf.ErrTruncated, "magic"},
		{"magic only", text("GGUF"), gguf.ErrTruncated, "version"},
		{"wrong magic", text("ggml").zeros(64), gguf.ErrNotGGUF, `"ggml"`},
		{"magic backwards", text("FUGG").zeros(64), gguf.ErrNotGGUF, `"FUGG"`},
		{"short and wrong", text("PK"), gguf.ErrNotGGUF, `"PK"`},
		{"version 0", version(0), gguf.ErrUnsupported, "version 0"},
		{"version 1", version(1), gguf.ErrUnsupported, "version 1"},
		{"version 4", version(4), gguf.ErrUnsupported, "version 4"},
		{"big-endian", version(3 << 24), gguf.ErrUnsupported, "version 3 in big-endian"},
		{"tensor count of all ones", head(math.MaxUint64, 0).zeros(99), gguf.ErrTruncated, "18446744073709551615 tensors"},
		{"tensor count that wraps", head(1<<61, 0).zeros(99), gguf.ErrTruncated, "2305843009213693952 tensors"},
		{"key count of all ones", head(0, math.MaxUint64).zeros(99), gguf.ErrTruncated, "18446744073709551615 keys"},
		{"key count that wraps", head(0, 1<<60).zeros(99), gguf.ErrTruncated, "1152921504606846976 keys"},
		{"more keys than are read", head(0, 1<<16+1).zeros(1 << 20), gguf.ErrUnsupported, "65537 keys"},
		{"one key too many", head(0, 2).str("a").u32(0).zeros(64), gguf.ErrMalformed, "key 1 is empty"},
	}
}

func hostileKeys() []hostile {
	return []hostile{
		{"key length of all ones", head(0, 1).u64(math.MaxUint64).zeros(64), gguf.ErrTruncated, "key 0: string of 18446744073709551615"},
		{"key length 2^62", head(0, 1).u64(1 << 62).zeros(64), gguf.ErrTruncated, "key 0"},
		{"key length 2^40", head(0, 1).u64(1 << 40).zeros(64), gguf.ErrTruncated, "key 0"},
		{"key past the end", head(0, 1).u64(65).zeros(64), gguf.ErrTruncated, "key 0"},
		{"key too long", head(0, 1).str(strings.Repeat("k", 1025)).u32(0).zeros(1), gguf.ErrMalformed, "too long"},
		{"empty key", head(0, 1).str("").u32(0).zeros(64), gguf.ErrMalformed, "key 0 is empty"},
		{"zero byte in a key", head(0, 1).str("a\x00b").u32(0).zeros(64), gguf.ErrMalformed, `zero byte in key "a\x00b"`},
		{"duplicate key", repeated(2, "twice"), gguf.ErrMalformed, `duplicate key "twice"`},
		{"value type 13", key().u32(13).zeros(64), gguf.ErrMalformed, `key "k": unknown value type 13`},
		{"value type of all ones", key().u32(math.MaxUint32).zeros(64), gguf.ErrMalformed, "unknown value type 4294967295"},
		{"value past the end", key().u32(10).zeros(7), gguf.ErrTruncated, `key "k"`},
		{"string value of all ones", key().u32(8).u64(math.MaxUint64).zeros(64), gguf.ErrTruncated, `key "k": string of 18446744073709551615`},
		{"string value past the end", key().u32(8).u64(10).zeros(9), gguf.ErrTruncated, `key "k": string of 10`},
		{"array of 2^63", key().u32(9).u32(0).u64(1 << 63).zeros(64), gguf.ErrTruncated, "array of 9223372036854775808"},
		{"array whose size wraps", key().u32(9).u32(10).u64(1 << 62).zeros(64), gguf.ErrTruncated, "array of 4611686018427387904"},
		{"array of 2^33", key().u32(9).u32(4).u64(1 << 33).zeros(64), gguf.ErrTruncated, "array of 8589934592"},
		{"array of strings that wraps", key().u32(9).u32(8).u64(1 << 61).zeros(64), gguf.ErrTruncated, "array of 2305843009213693952"},
		{"array of a long string", key().u32(9).u32(8).u64(2).str("a").u64(1 << 62).zeros(64), gguf.ErrTruncated, "element 1: string of"},
		{"array of strings cut", key().u32(9).u32(8).u64(2).str("abcdefgh"), gguf.ErrTruncated, "element 1"},
		{"array of arrays", nested(5000), gguf.ErrUnsupported, `key "k": array of arrays`},
		{"array of unknown type", key().u32(9).u32(13).u64(1).zeros(64), gguf.ErrMalformed, "array of unknown value type 13"},
		{"alignment 0", alignment(0), gguf.ErrMalformed, "is 0, not a power of two"},
		{"alignment 48", alignment(48), gguf.ErrMalformed, "is 48, not a power of two"},
		{"alignment past the end", alignment(1 << 31), gguf.ErrTruncated, `tensor "w"`},
		{"alignment of another type", head(0, 1).str("general.alignment").u32(10).u64(32), gguf.ErrMalformed, "type u64, expected u32"},
		{"alignment as text", head(0, 1).str("general.alignment").u32(8).str("32"), gguf.ErrMalformed, "type string, expected u32"},
	}
}

func nested(depth int) *raw {
	r := key().u32(9)
	for range depth {
		r.u32(9).u64(1)
	}
	return r.u32(0).u64(1).zeros(1)
}

func hostileTensors() []hostile {
	max := uint64(math.MaxUint64)
	return []hostile{
		{"name of 64 bytes", head(1, 0).tensor(strings.Repeat("n", 64), 0, 0, 1).zeros(99), gguf.ErrMalformed, "64 bytes is too long"},
		{"name of all ones", head(1, 0).u64(max).zeros(99), gguf.ErrTruncated, "tensor 0: string of"},
		{"no name", head(1, 0).tensor("", 0, 0, 1).zeros(99), gguf.ErrMalformed, "without a name"},
		{"zero byte in a name", head(1, 0).tensor("w\x00x", 0, 0, 1).zeros(99), gguf.ErrMalformed, `"w\x00x": zero byte`},
		{"duplicate name", head(2, 0).tensor("w", 0, 0, 1).tensor("w", 0, 32, 1).zeros(99), gguf.ErrMalformed, `duplicate tensor "w"`},
		{"5 dimensions", one(gguf.F32, 1, 1, 1, 1, 1), gguf.ErrMalformed, "5 dimensions"},
		{"2^31 dimensions", head(1, 0).str("w").u32(1 << 31).zeros(99), gguf.ErrMalformed, "2147483648 dimensions"},
		{"dimension 0", one(gguf.F32, 4, 0), gguf.ErrMalformed, "dimension 1 is 0"},
		{"dimension -1", one(gguf.F32, max), gguf.ErrMalformed, "dimension 0 is -1"},
		{"elements that wrap", one(gguf.F32, 1<<32, 1<<32), gguf.ErrMalformed, "overflow"},
		{"four dimensions that wrap to 0", one(gguf.I8, 1<<16, 1<<16, 1<<16, 1<<16), gguf.ErrMalformed, "overflow"},
		{"bytes that wrap", one(gguf.F64, 1<<60, 2), gguf.ErrMalformed, "overflow"},
		{"elements that wrap in few bytes", one(gguf.Q1_0, 1<<40, 1<<24), gguf.ErrMalformed, "overflow"},
		{"unknown type", one(43, 32), gguf.ErrUnsupported, "type 43"},
		{"removed type", one(4, 32), gguf.ErrUnsupported, "type 4 is unknown or was removed"},
		{"removed repacked type", one(31, 32), gguf.ErrUnsupported, "type 31"},
		{"type -1", one(math.MaxUint32, 32), gguf.ErrUnsupported, "type 4294967295"},
		{"row of no whole block", one(gguf.Q8_0, 33), gguf.ErrMalformed, "33 elements are no multiple of the 32"},
		{"element of a block type", one(gguf.Q4_K), gguf.ErrMalformed, "1 elements are no multiple of the 256"},
		{"data of 2^62 bytes", one(gguf.I8, 1<<62), gguf.ErrTruncated, "run past the end"},
		{"data one byte short", head(1, 0).tensor("w", gguf.F32, 0, 16).pad().zeros(63), gguf.ErrTruncated, "run past the end"},
		{"no data at all", head(1, 0).tensor("w", gguf.F32, 0, 16), gguf.ErrTruncated, "has 0 bytes of data"},
		{"offset of all ones", two(0, max), gguf.ErrTruncated, `"two": offset 18446744073709551615`},
		{"offset past the end", two(0, 1<<20), gguf.ErrTruncated, "offset 1048576"},
		{"offset not aligned", two(0, 65), gguf.ErrMalformed, "offset 65 is not aligned to 32"},
		{"overlap", two(0, 32), gguf.ErrMalformed, `"two": offset 32 overlaps`},
		{"same place", two(0, 0), gguf.ErrMalformed, `"two": offset 0 overlaps`},
		{"gap", two(0, 96), gguf.ErrMalformed, `"two": offset 96 leaves a gap`},
		{"gap before the first", two(32, 96), gguf.ErrMalformed, `"one": offset 32 leaves a gap`},
		{"order exchanged", two(64, 0), gguf.ErrMalformed, `"one": offset 64`},
		{"laid out at another alignment", alignedOtherwise(), gguf.ErrMalformed, `"b": offset 32 is not aligned to 64`},
	}
}

func alignedOtherwise() *raw {
	r := head(2, 1).str("general.alignment").u32(4).u32(64)
	return r.tensor("a", gguf.F32, 0, 4).tensor("b", gguf.F32, 32, 4).zeros(512)
}

func TestParseRefusesHostileFiles(t *testing.T) {
	for _, h := range hostileFiles() {
		t.Run(h.name, func(t *testing.T) {
			_, err := gguf.Parse(bytes.NewReader(h.file.Bytes()), int64(h.file.Len()))
			if !errors.Is(err, h.kind) {
				t.Fatalf("got %v, expected %v", err, h.kind)
			}
			var typed *gguf.Error
			if !errors.As(err, &typed) {
				t.Fatalf("%v is no *Error", err)
			}
			if !strings.Contains(err.Error(), h.says) {
				t.Errorf("%q does not say %q", err, h.says)
			}
			if typed.Offset < 0 || typed.Offset > int64(h.file.Len()) {
				t.Errorf("byte %d of a file of %d", typed.Offset, h.file.Len())
			}
		})
	}
}

// Sparse files claim much and hold nothing; the time a header takes must not follow the claim.
func TestParseBoundsTheHeader(t *testing.T) {
	for name, header := range map[string]*raw{
		"strings":  key().u32(9).u32(8).u64(1 << 36),
		"bytes":    key().u32(9).u32(0).u64(1 << 39),
		"one text": key().u32(8).u64(1 << 39),
	} {
		_, err := gguf.Parse(filled{header.Bytes(), 1 << 40}, 1<<40)
		checkSays(t, name, err, gguf.ErrUnsupported, "header of more than 128 MiB")
	}
}

func TestParseAllocatesLittleForLargeClaims(t *testing.T) {
	for _, h := range hostileFiles() {
		t.Run(h.name, func(t *testing.T) {
			r := bytes.NewReader(h.file.Bytes())
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := gguf.Parse(r, r.Size())
			runtime.ReadMemStats(&after)
			if err == nil {
				t.Fatal("accepted")
			}
			if got := after.TotalAlloc - before.TotalAlloc; got > 256<<10 {
				t.Errorf("%d bytes allocated for a file of %d", got, r.Size())
			}
		})
	}
}

func TestParseRefusesEveryCut(t *testing.T) {
	data := small(t)
	f := parse(t, data)
	last := f.Tensors[len(f.Tensors)-1]
	end := f.DataOffset + last.Offset + last.Size
	for n := range int64(len(data)) {
		_, err := gguf.Parse(bytes.NewReader(data[:n]), n)
		if n >= end {
			if err != nil {
				t.Errorf("cut in the padding behind the last tensor, at %d: %v", n, err)
			}
		} else if !errors.Is(err, gguf.ErrTruncated) {
			t.Errorf("cut at %d: got %v", n, err)
		}
	}
}

func TestParseRefusesAFileThatShrinks(t *testing.T) {
	data := small(t)
	for _, n := range []int{0, 3, 30, 200, 5400} {
		_, err := gguf.Parse(bytes.NewReader(data[:n]), int64(len(data)))
		if !errors.Is(err, gguf.ErrTruncated) {
			t.Errorf("shrunk to %d: got %v", n, err)
		}
	}
}

type broken struct{ err error }

func (b broken) ReadAt([]byte, int64) (int, error) { return 0, b.err }

func TestParseKeepsTheReasonOfAFailedRead(t *testing.T) {
	reason := errors.New("the disk is gone")
	_, err := gguf.Parse(broken{reason}, 1000)
	if !errors.Is(err, reason) {
		t.Fatalf("got %v", err)
	}
	if _, err := gguf.Parse(broken{reason}, -1); !errors.Is(err, gguf.ErrTruncated) {
		t.Fatalf("negative size: got %v", err)
	}
}
