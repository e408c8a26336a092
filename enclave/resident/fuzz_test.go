package resident

import (
	"encoding/binary"
	"math"
	"testing"

	"github.com/kvshield/kvshield/enclave"
)

func FuzzCheck(f *testing.F) {
	s := sealedScene(f, enclave.StorageF16, 5)
	header, records := s.save()
	for _, record := range records {
		f.Add(header, record)
	}
	f.Add(header[:100], []byte{})
	f.Fuzz(func(t *testing.T, header, record []byte) {
		o, err := s.store.Opener(header)
		if err != nil {
			return
		}
		text, end, err := o.Check(nil, record)
		if err == nil && (string(record) != string(records[0]) || end || text == nil) {
			t.Errorf("a record that was not sealed as the first one was opened")
		}
		if err := o.Place(0, record, s.id, []int64{1}); err == nil {
			t.Error("a text was placed")
		}
	})
}

// numbers deals out the fuzzer's bytes as arguments: small, negative, huge.
type numbers []byte

func (n *numbers) next() int {
	if len(*n) == 0 {
		return 0
	}
	b := (*n)[0]
	*n = (*n)[1:]
	switch {
	case b < 200:
		return int(b)
	case b < 240:
		return int(b) - 220
	case b < 250:
		return 1 << (b - 240) * 100
	}
	return []int{math.MaxInt, math.MinInt, math.MaxInt32, 1 << 26, 1 << 24, 900}[b-250]
}

// less is mostly below n, so that calls get further than the first check.
func (n *numbers) less(than int) int {
	x := n.next()
	if x < 200 && x >= 0 {
		return x % than
	}
	return x
}

func (n *numbers) floats(most int) []float32 {
	list := make([]float32, max(0, min(most, 1<<12)))
	for i := range list {
		list[i] = float32(n.next()) / 8
	}
	return list
}

func FuzzStore(f *testing.F) {
	f.Add([]byte{0, 4, 2, 8, 8, 60, 2, 0, 1, 0, 4, 2, 1, 7, 2, 2, 3, 4, 5, 6, 2, 0, 0, 2, 0, 2, 1, 1})
	f.Add([]byte("declare begin attend rotate keep copy clear release"))
	f.Add([]byte{250, 251, 252, 253, 254, 255, 3, 1, 1, 4, 0, 0, 8, 2, 3, 5, 1, 0, 6, 9, 9, 9})
	r := keeper(f, Options{Limit: 1 << 24, Threads: 2, Digest: digestOf})
	f.Fuzz(func(t *testing.T, data []byte) {
		s := r.OpenStore(modelsOf(1))
		defer s.Close()
		layer := demo
		layer.Cells = 70
		first := declare(t, s, layer)
		w, err := s.Sealer()
		if err != nil {
			t.Fatal(err)
		}
		n := numbers(data)
		for len(n) > 0 {
			id := first + enclave.CacheID(n.less(2))
			call(s, w, id, &n)
		}
	})
}

// call makes one call with what the fuzzer says; only panics, hangs and the race detector count.
func call(s enclave.Store, w enclave.Sealer, id enclave.CacheID, n *numbers) {
	switch n.less(9) {
	case 0:
		_, _ = s.Declare([]enclave.LayerCache{{QueryHeads: n.next(), KVHeads: n.next(), DimK: n.next(), DimV: n.next(),
			Cells: n.next(), Streams: n.next(), Storage: enclave.Storage(n.less(3))}})
	case 1:
		b := &enclave.Batch{Tokens: n.less(9), Blocks: n.less(3), Mask: enclave.MaskType(n.less(3)), MaskCells: n.less(70), MaskRows: n.less(12)}
		for range min(max(0, b.Tokens), 4096) {
			b.Cells = append(b.Cells, int64(n.less(210)))
		}
		for range min(max(0, b.Blocks*b.MaskRows*b.MaskCells), 1<<12) * elementBytes(b.Mask&3) {
			b.MaskData = append(b.MaskData, byte(n.next()))
		}
		_ = s.Begin(n.less(2), b)
	case 2:
		a := &enclave.Attention{Slot: n.less(2), PutFirst: n.less(4), PutCount: n.less(9), QueryFirst: n.less(4), QueryCount: n.less(9), Scale: float32(n.next())}
		a.K, a.V = n.floats(a.PutCount*80), n.floats(a.PutCount*48)
		a.Q, a.Out = n.floats(a.QueryCount*240), make([]float32, max(0, min(a.QueryCount*144, 1<<12)))
		_ = s.Attend(id, a)
	case 3:
		r := plainRope
		r.First, r.Dims, r.Mode, r.Hadamard = n.less(210), n.less(41), int32(n.less(3)), n.less(9)
		r.Shift = []int32{int32(n.next()), int32(n.next())}
		_ = s.Rotate(id, &r)
	case 4:
		count := n.less(210)
		keep := make([]uint32, max(0, min(count/32+1, 64)))
		for i := range keep {
			keep[i] = binary.LittleEndian.Uint32([]byte{byte(n.next()), 0xf0, 0x0f, byte(n.next())})
		}
		_ = s.Keep(id, n.less(210), count, keep)
	case 5:
		_ = s.Copy(id, n.less(3), n.less(3))
	case 6:
		_, _ = w.Cells(nil, id, []int64{int64(n.less(210)), int64(n.less(210))})
	case 7:
		_ = s.Clear(id)
	case 8:
		_ = s.Release(id)
	}
}
