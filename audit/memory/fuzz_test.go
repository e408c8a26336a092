package memory

import (
	"bytes"
	"testing"
)

// FuzzScan compares a scan of any memory, from any place, with what comparing every row at every place finds. Rows that
// match exactly must be found; what is found must match.
func FuzzScan(f *testing.F) {
	const rows, columns = 20, 48
	m := dictionary(1, rows, columns)
	s := NewScanner(m)
	seeds := 0
	for _, kind := range []string{F16, F32} {
		memory := random(9, 4096)
		plant(memory[96:], m, []int32{3, 4, 5, 3}, kind, 0.001)
		plant(memory[2048+32:], m, []int32{19, 0}, kind, 0)
		for _, start := range []uint16{0, 1, 96, 97, 4000} {
			f.Add(memory, start)
			seeds++
		}
	}
	if seeds == 0 {
		f.Fatal("the seed corpus is empty")
	}
	f.Fuzz(func(t *testing.T, memory []byte, start uint16) {
		begin := min(int(start), len(memory))
		got := map[Hit]bool{}
		err := s.Scan(t.Context(), bytes.NewReader(memory), uint64(begin), uint64(len(memory)), func(h Hit) {
			h.Distance = 0
			got[h] = true
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range s.layouts {
			for at := (begin + alignment - 1) / alignment * alignment; at+l.row <= len(memory); at += alignment {
				match := 0
				for token := range rows {
					limit := s.limits[token]
					d := l.distance(memory[at:at+l.row], m.Row(token), limit)
					h := Hit{Address: uint64(at), Token: int32(token), Type: l.name}
					if found := got[h]; d <= limit/1e4 && !found || !(d <= limit) && found {
						t.Errorf("%+v at %g of the limit: found is %v", h, d/limit, found)
					}
					if got[h] {
						match++
						delete(got, h)
					}
				}
				if match > 1 {
					t.Errorf("%d hits at %d", match, at)
				}
			}
		}
		for h := range got {
			t.Errorf("%+v, where no row can be", h)
		}
	})
}
