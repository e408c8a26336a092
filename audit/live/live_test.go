package live

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/hooks/session"
)

// Nobody but an audit gets a dump: the hook itself refuses.
func TestDumpIsRefusedOutsideAnAudit(t *testing.T) {
	s, err := supervisor.New(t.Context(), supervisor.Config{Hook: "../../bin/libkvshield.so", Enclave: "../../bin/kvshield-enclave",
		Args: []string{"--tee", "software"}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatalf("%v; run make build", err)
	}
	defer s.Close()
	dir, err := os.MkdirTemp("/tmp", "kvs-live-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	engine, err := llamacpp.StartServer(llamacpp.ServerConfig{Program: "../../.engine/bin/llama-server", Model: "../../examples/model/demo.gguf",
		Socket: filepath.Join(dir, "s.sock"), Args: []string{"-np", "1", "-c", "256"}, Env: s.Environment(os.Environ())})
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := engine.WaitHealthy(ctx); err != nil {
		t.Fatal(err)
	}
	_, err = s.Dump(ctx, engine.PID())
	var refused *session.RefusedError
	if !errors.As(err, &refused) {
		t.Errorf("%v, want a refusal", err)
	}
	if _, err := s.Dump(ctx, os.Getpid()); err == nil {
		t.Error("a process without a hook was dumped")
	}
}

func TestObservingTakesAnAudit(t *testing.T) {
	if _, err := supervisor.New(t.Context(), supervisor.Config{Observe: true, Log: slog.New(slog.DiscardHandler), Hook: "../../bin/libkvshield.so"}); err == nil {
		t.Error("a run that shields nothing was started without an audit")
	}
}

// made is a small dump: one layer of two heads, four cells of which three are used.
func made(transposed bool) []byte {
	var b bytes.Buffer
	flags := uint32(0)
	if transposed {
		flags = flagTransposed
	}
	for _, v := range []uint32{magic, version, flags, 0} {
		_ = binary.Write(&b, binary.LittleEndian, v)
	}
	cells := []float32{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0, 0}
	turned := []float32{1, 5, 9, 0, 2, 6, 10, 0, 3, 7, 11, 0, 4, 8, 12, 0}
	record(&b, kindCache, "cache_k_l0", cells)
	if transposed {
		record(&b, kindCache, "cache_v_l0", turned)
	} else {
		record(&b, kindCache, "cache_v_l0", cells)
	}
	record(&b, kindBuffer, "CPU", nil)
	b.Write(make([]byte, recordSize))
	return b.Bytes()
}

func record(b *bytes.Buffer, kind uint32, name string, data []float32) {
	h := make([]byte, recordSize)
	le := binary.LittleEndian
	le.PutUint32(h, kind)
	for i, n := range []uint64{4, 4, 1, 1} {
		le.PutUint64(h[8+8*i:], n)
	}
	le.PutUint64(h[40:], uint64(4*len(data)))
	copy(h[48:], name)
	b.Write(h)
	_ = binary.Write(b, le, data)
}

func TestSnapshotOfADump(t *testing.T) {
	for _, transposed := range []bool{false, true} {
		d, err := Read(bytes.NewReader(made(transposed)))
		if err != nil {
			t.Fatal(err)
		}
		s, err := d.Snapshot(1, 2)
		if err != nil {
			t.Fatal(err)
		}
		if s.Tokens() != 3 || s.Layers[0].V.Row(1)[2] != 7 || s.Layers[0].K.Row(2)[0] != 9 {
			t.Errorf("transposed %v: %d tokens, %v", transposed, s.Tokens(), s.Layers[0].V)
		}
		if _, err := d.Snapshot(2, 2); !errors.Is(err, ErrUnsupported) {
			t.Errorf("a layer that is not there: %v", err)
		}
	}
}

func TestDamagedDumps(t *testing.T) {
	whole := made(false)
	for n := range len(whole) {
		if _, err := Read(bytes.NewReader(whole[:n])); !errors.Is(err, ErrMalformed) {
			t.Fatalf("the first %d of %d bytes: %v", n, len(whole), err)
		}
	}
	for _, at := range []int{0, 4, 8, 16} {
		b := bytes.Clone(whole)
		b[at] = 77
		if _, err := Read(bytes.NewReader(b)); !errors.Is(err, ErrMalformed) {
			t.Errorf("byte %d changed: %v", at, err)
		}
	}
	huge := bytes.Clone(whole)
	binary.LittleEndian.PutUint64(huge[16+40:], 1<<62)
	if _, err := Read(bytes.NewReader(huge)); !errors.Is(err, ErrMalformed) {
		t.Errorf("a record of 2^62 bytes: %v", err)
	}
}

func FuzzRead(f *testing.F) {
	for _, transposed := range []bool{false, true} {
		f.Add(made(transposed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Read(bytes.NewReader(b))
		if err != nil {
			return
		}
		if s, err := d.Snapshot(1, 2); err == nil && s.Check() != nil {
			t.Error("a snapshot that does not hold together")
		}
	})
}
