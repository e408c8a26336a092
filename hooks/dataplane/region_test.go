package dataplane

import (
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/frame"
)

const (
	patience = 20 * time.Second
	known    = 7 // the model that halves knows
	tooHigh  = 9 // a layer that it refuses
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// halves is an enclave whose inverse is to halve every value.
type halves struct{}

func (halves) Invert(id enclave.ModelID, layer int, dst, src []float32) error {
	if id != known {
		return enclave.ErrUnknownModel
	}
	if layer >= tooHigh {
		return errors.New("no such layer")
	}
	for i, v := range src {
		dst[i] = v / 2
	}
	return nil
}

func create(t *testing.T, capacity uint32) *os.File {
	t.Helper()
	f, err := Create(capacity)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// connect returns the engine's end of a region that is being served.
func connect(t *testing.T, capacity uint32, inverter enclave.Inverter, spin time.Duration) *Region {
	t.Helper()
	f := create(t, capacity)
	ends := [2]*Region{}
	for i := range ends {
		var err error
		if ends[i], err = Map(f); err != nil {
			t.Fatal(err)
		}
	}
	served := make(chan struct{})
	go func() { defer close(served); ends[1].Serve(&Target{Inverter: inverter}, spin) }()
	t.Cleanup(func() {
		ends[1].Stop()
		select {
		case <-served:
		case <-time.After(patience):
			t.Fatal("Serve did not return after Stop")
		}
		for _, r := range ends {
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return ends[0]
}

func request(sequence uint64, rows, rowFloats uint32) frame.Header {
	return frame.Header{Type: frame.Invert, Model: known, Rows: rows, RowBytes: 4 * rowFloats, Sequence: sequence, Payload: 4 * rows * rowFloats}
}

func bytesOf(values []float32) []byte {
	b := make([]byte, 4*len(values))
	copy(floats(b), values)
	return b
}

func TestExchangeInverts(t *testing.T) {
	for name, spin := range map[string]time.Duration{"asleep": 0, "spinning": time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			r := connect(t, 4096, halves{}, spin)
			for sequence := range uint64(200) {
				v := float32(sequence + 1)
				h, rows, err := r.Exchange(request(sequence, 2, 2), bytesOf([]float32{v, -v, 4, 0}), spin, patience)
				if err != nil {
					t.Fatal(err)
				}
				got := floats(rows)
				if h.Type != frame.Reply || h.Sequence != sequence || h.Rows != 2 || len(got) != 4 || got[0] != v/2 || got[1] != -v/2 || got[2] != 2 {
					t.Fatalf("transition %d: %+v %v", sequence, h, got)
				}
			}
		})
	}
}

func TestCapacityIsFilledAndNotPassed(t *testing.T) {
	r := connect(t, 4096, halves{}, 0)
	full := make([]float32, 1024)
	full[1023] = 6
	_, rows, err := r.Exchange(request(1, 1, 1024), bytesOf(full), 0, patience)
	if err != nil || floats(rows)[1023] != 3 {
		t.Fatalf("a full frame: %v", err)
	}
	h, _, err := r.Exchange(request(2, 1, 1025), nil, 0, patience)
	if err != nil || h.Type != frame.Error || h.Status != frame.StatusMalformed {
		t.Fatalf("a frame beyond the capacity: %+v, %v", h, err)
	}
}

func TestErrorsBecomeStatuses(t *testing.T) {
	r := connect(t, 4096, halves{}, 0)
	unknown, refused := request(5, 1, 1), request(6, 1, 1)
	unknown.Model, refused.Layer = known+1, tooHigh
	reply, uneven, huge := request(7, 1, 1), request(8, 1, 1), request(9, 1, 1)
	reply.Type, uneven.RowBytes, huge.Rows = frame.Reply, 3, 1<<31
	for name, test := range map[string]struct {
		request frame.Header
		status  uint32
	}{
		"unknown model":  {unknown, frame.StatusUnknownModel},
		"refused layer":  {refused, frame.StatusRefused},
		"a reply":        {reply, frame.StatusMalformed},
		"uneven row":     {uneven, frame.StatusMalformed},
		"rows overflow":  {huge, frame.StatusMalformed},
		"nothing at all": {frame.Header{}, frame.StatusMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			h, rows, err := r.Exchange(test.request, make([]byte, 4), 0, patience)
			if err != nil || h.Type != frame.Error || h.Status != test.status || len(rows) == 0 || len(rows) > frame.ErrorTextMax {
				t.Errorf("%+v with %d bytes, %v; want status %d", h, len(rows), err, test.status)
			}
		})
	}
	if _, rows, err := r.Exchange(request(10, 1, 1), bytesOf([]float32{8}), 0, patience); err != nil || floats(rows)[0] != 4 {
		t.Errorf("after the errors: %v", err)
	}
}

func TestRegionsAreServedAtOnce(t *testing.T) {
	var wg sync.WaitGroup
	for id := range 4 {
		r := connect(t, 8192, halves{}, 0)
		wg.Go(func() {
			for i := range uint64(100) {
				v := float32(int(i)*10 + id)
				_, rows, err := r.Exchange(request(i, 1, 1), bytesOf([]float32{v}), 0, patience)
				if err != nil || floats(rows)[0] != v/2 {
					t.Errorf("region %d, transition %d: %v", id, i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestExchangeGivesUp(t *testing.T) {
	r, err := Map(create(t, 4096))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	_, _, err = r.Exchange(request(1, 1, 1), make([]byte, 4), 0, 20*time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "the enclave did not answer within 20ms") {
		t.Errorf("Exchange with nobody there: %v", err)
	}
}

func TestCreateRefusesCapacity(t *testing.T) {
	for _, capacity := range []uint32{0, 1, 4095, 4097, 1<<30 + 4096, 1<<32 - 4096} {
		if f, err := Create(capacity); err == nil {
			f.Close()
			t.Errorf("a capacity of %d was taken", capacity)
		}
	}
}

func TestMapRefuses(t *testing.T) {
	other := create(t, 4096)
	if _, err := other.WriteAt([]byte{frame.Version - 1}, 4); err != nil {
		t.Fatal(err)
	}
	lies := create(t, 4096)
	if _, err := lies.WriteAt([]byte{0, 32}, 8); err != nil {
		t.Fatal(err)
	}
	regular, err := os.Create(t.TempDir() + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer regular.Close()
	for name, test := range map[string]struct {
		file *os.File
		want string
	}{
		"a file on disk": {regular, "not sealed against shrinking"},
		"unsealed":       {memory(t, Size(4096), 0), "not sealed against shrinking"},
		"empty":          {memory(t, 0, unix.F_SEAL_SHRINK), "cannot have 0 bytes"},
		"odd size":       {memory(t, Size(4096)+1, unix.F_SEAL_SHRINK), "cannot have"},
		"half a page":    {memory(t, Size(4096)+4096, unix.F_SEAL_SHRINK), "cannot have"},
		"huge":           {memory(t, Size(1<<30)+8192, unix.F_SEAL_SHRINK), "cannot have"},
		"blank":          {memory(t, Size(4096), unix.F_SEAL_SHRINK), "of another version"},
		"version":        {other, "of another version"},
		"capacity":       {lies, "of another version"},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := Map(test.file)
			if err == nil {
				r.Close()
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Map: %v, want %q", err, test.want)
			}
		})
	}
}

func memory(t *testing.T, size int64, seals int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "test")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return f
}

// A peer that could shrink the region could kill the other end with a bus error.
func TestRegionCannotBeResizedByAPeer(t *testing.T) {
	f := create(t, 4096)
	for _, size := range []int64{0, Size(4096) - 1, Size(4096) + 4096} {
		if err := f.Truncate(size); !errors.Is(err, unix.EPERM) {
			t.Errorf("to %d bytes: %v, want EPERM", size, err)
		}
	}
}
