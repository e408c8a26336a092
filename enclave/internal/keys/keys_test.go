package keys

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"testing/iotest"
)

const purpose = "kvshield/v1/permute/layer=3/kvhead=1/v"

func testRoot(t *testing.T, fill byte) *Root {
	t.Helper()
	r, err := New(bytes.NewReader(bytes.Repeat([]byte{fill}, Size)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Destroy)
	return r
}

func shuffled(t *testing.T, r *Root, info string, n int) []uint16 {
	t.Helper()
	s, err := r.Stream(info)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	p := make([]uint16, n)
	for i := range p {
		p[i] = uint16(i)
	}
	s.Shuffle(p)
	return p
}

// A change of these vectors is a change of the key schedule.
func TestVectors(t *testing.T) {
	tests := []struct {
		fill byte
		info string
		want []uint16
	}{
		{1, purpose, []uint16{11, 5, 15, 14, 13, 12, 4, 1, 6, 0, 9, 3, 10, 7, 2, 8}},
		{1, "kvshield/v1/permute/pairs", []uint16{4, 12, 14, 7, 13, 10, 5, 2, 15, 11, 9, 6, 8, 0, 3, 1}},
		{2, purpose, []uint16{0, 4, 11, 1, 6, 12, 9, 5, 7, 3, 14, 10, 2, 15, 8, 13}},
	}
	for _, tt := range tests {
		got := shuffled(t, testRoot(t, tt.fill), tt.info, 16)
		if !slices.Equal(got, tt.want) {
			t.Errorf("root %d, %s: %v, want %v", tt.fill, tt.info, got, tt.want)
		}
	}
}

func TestInfoSeparates(t *testing.T) {
	r := testRoot(t, 7)
	seen := map[string]string{}
	for _, info := range []string{"a", "b", purpose, "kvshield/v1/permute/layer=31/kvhead=/v", "kvshield/v1/permute/layer=3/kvhead=1/w"} {
		var key []byte
		for _, v := range shuffled(t, r, info, 64) {
			key = append(key, byte(v))
		}
		if other, twice := seen[string(key)]; twice {
			t.Errorf("%q and %q give the same permutation", info, other)
		}
		seen[string(key)] = info
	}
}

func TestSystemRandomnessDiffers(t *testing.T) {
	a, err := New(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Destroy()
	b, err := New(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Destroy()
	if bytes.Equal(a.mem.Bytes(), b.mem.Bytes()) {
		t.Error("two roots are the same")
	}
}

// The seed is fixed, so the statistic is one number and the test cannot flake.
func TestShuffleIsUniform(t *testing.T) {
	const draws = 24000
	s := newStream(&[Size]byte{42})
	count := map[[4]uint16]int{}
	for range draws {
		p := [4]uint16{0, 1, 2, 3}
		s.Shuffle(p[:])
		count[p]++
	}
	if len(count) != 24 {
		t.Fatalf("%d of 24 orders appear", len(count))
	}
	chi, expected := 0.0, float64(draws)/24
	for _, n := range count {
		d := float64(n) - expected
		chi += d * d / expected
	}
	if chi > 49.7 { // 0.999 quantile, 23 degrees of freedom
		t.Errorf("chi-square %.1f: the orders are not equally likely", chi)
	}
}

// A bound just above half of the range would show a bias of two to one without rejection.
func TestBelowRejects(t *testing.T) {
	const n = 3 << 30
	s := newStream(&[Size]byte{9})
	low := 0
	for range 3000 {
		if s.below(n) < n/3 {
			low++
		}
	}
	if low < 900 || low > 1100 {
		t.Errorf("%d of 3000 draws in the lowest third, want about 1000", low)
	}
}

func TestBitsAreBalanced(t *testing.T) {
	s := newStream(&[Size]byte{3})
	ones := 0
	for range 10000 {
		ones += int(s.Bit())
	}
	if ones < 4800 || ones > 5200 {
		t.Errorf("%d of 10000 bits are set", ones)
	}
}

func TestDestroy(t *testing.T) {
	r := testRoot(t, 5)
	r.Destroy()
	r.Destroy()
	if _, err := r.Stream(purpose); !errors.Is(err, errDestroyed) {
		t.Errorf("a destroyed root gave a stream: %v", err)
	}
}

func TestCloseOverwritesTheState(t *testing.T) {
	s := newStream(&[Size]byte{8})
	s.Close()
	got, _ := s.source.MarshalBinary()
	want, _ := newStream(&[Size]byte{}).source.MarshalBinary()
	if !bytes.Equal(got, want) {
		t.Error("the state still depends on the sub-key")
	}
}

func TestNoRandomness(t *testing.T) {
	broken := errors.New("broken")
	if _, err := New(iotest.ErrReader(broken)); !errors.Is(err, broken) {
		t.Errorf("error %v, want %v", err, broken)
	}
	if _, err := New(bytes.NewReader(make([]byte, Size-1))); err == nil {
		t.Error("a short root was accepted")
	}
}
