package memory

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

// someMaps has one line of each kind that is told apart.
const someMaps = `00400000-00401000 r-xp 00000000 fe:00 42                                /usr/bin/llama-server
00401000-00402000 rw-p 00001000 fe:00 42                                /usr/bin/llama-server
00402000-00403000 rw-p 00000000 00:00 0                                 [heap]
00403000-00404000 rw-p 00000000 00:00 0 
10000000-10001000 ---p 00000000 00:00 0 
20000000-20001000 r--s 00000000 fe:00 43                                /models/a b.gguf
20001000-20002000 r--s 00000000 00:01 44                                /memfd:ring (deleted)
20002000-20003000 rw-s 00000000 00:06 45                                /dev/dri/renderD128
20003000-20004000 r--p 00000000 fe:00 46                                /tmp/x (deleted)
7fff00000000-7fff00004000 r--p 00000000 00:00 0                         [vvar]
7fff00004000-7fff00006000 r--p 00000000 00:00 0                         [vvar_vclock]
7fff00006000-7fff00008000 r-xp 00000000 00:00 0                         [vdso]
ffffffffff600000-ffffffffff601000 r-xp 00000000 00:00 0                 [vsyscall]
`

func TestChoose(t *testing.T) {
	mappings, err := parseMaps(strings.NewReader(someMaps))
	if err != nil {
		t.Fatal(err)
	}
	spans, total, skipped := choose(mappings)
	want := []span{{0x401000, 0x402000, false}, {0x402000, 0x404000, true}, {0x20001000, 0x20004000, false}, {0x7fff00006000, 0x7fff00008000, true}}
	if !reflect.DeepEqual(spans, want) {
		t.Errorf("%+v", spans)
	}
	if total != 8*page || skipped != 10*page {
		t.Errorf("%d pages to read, %d not", total/page, skipped/page)
	}
	if mappings[5].path != "/models/a b.gguf" {
		t.Errorf("path %q", mappings[5].path)
	}
}

func TestMalformedMaps(t *testing.T) {
	for _, line := range []string{
		"", "x", "1000-2000", "1000-2000 r-xp", "2000-1000 r-xp 0 0:0 0", "1000-2000 r 0 0:0 0", "1000-2000 r-xp 0 0:0 x",
		"1000-10000000000000000 r-xp 0 0:0 0", "-2000 r-xp 0 0:0 0", "1000-3000 r-xp 0 0:0 0\n2000-4000 r-xp 0 0:0 0",
	} {
		if _, err := parseMaps(strings.NewReader(line + "\n")); !errors.Is(err, errMaps) {
			t.Errorf("%q: %v", line, err)
		}
	}
}

func FuzzMaps(f *testing.F) {
	f.Add(someMaps)
	for line := range strings.Lines(someMaps) {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, text string) {
		mappings, err := parseMaps(strings.NewReader(text))
		if err != nil {
			return
		}
		var again strings.Builder
		for _, m := range mappings {
			fmt.Fprintf(&again, "%x-%x %s 0 0:0 %d %s\n", m.start, m.end, m.mode, m.inode, m.path)
		}
		twice, err := parseMaps(strings.NewReader(again.String()))
		if err != nil || !reflect.DeepEqual(mappings, twice) {
			t.Errorf("%q became %q: %v", text, again.String(), err)
		}
		spans, total, skipped := choose(mappings)
		for _, s := range spans {
			total -= s.end - s.start
		}
		for _, m := range mappings {
			if !m.worthReading() {
				skipped -= m.end - m.start
			}
		}
		if total != 0 || skipped != 0 {
			t.Errorf("%q: the sums are off by %d and %d", text, total, skipped)
		}
	})
}
