package memory

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"

	"github.com/kvshield/kvshield/audit"
)

const (
	testTokens  = 3000
	testColumns = 64
)

func dictionary(seed uint64) audit.Matrix {
	r := rand.New(rand.NewPCG(seed, 1))
	m := audit.NewMatrix(testTokens, testColumns)
	for i := range m.Data {
		m.Data[i] = float32(r.NormFloat64())
	}
	return m
}

// planted writes the rows of tokens, a little off, into random memory.
func planted(m audit.Matrix, tokens []int32, element int, at int) []byte {
	r := rand.New(rand.NewPCG(7, 7))
	memory := make([]byte, 4<<20)
	for i := 0; i+8 <= len(memory); i += 8 {
		binary.LittleEndian.PutUint64(memory[i:], r.Uint64())
	}
	for i, t := range tokens {
		for j, v := range m.Row(int(t)) {
			v *= 1 + float32(0.005*r.NormFloat64())
			place := memory[at+(i*testColumns+j)*element:]
			if element == 2 {
				binary.LittleEndian.PutUint16(place, toHalf(v))
			} else {
				binary.LittleEndian.PutUint32(place, math.Float32bits(v))
			}
		}
	}
	return memory
}

// toHalf cuts the fraction off.
func toHalf(v float32) uint16 {
	b := math.Float32bits(v)
	exponent := int(b>>23&255) - 112
	if exponent <= 0 {
		return uint16(b >> 31 << 15)
	}
	return uint16(b>>31<<15 | uint32(exponent)<<10 | b>>13&1023)
}

func conversation(n int) []int32 {
	tokens := make([]int32, n)
	for i := range tokens {
		tokens[i] = int32(i * 37 % testTokens)
	}
	return tokens
}

func TestPlantedRowsAreFound(t *testing.T) {
	m := dictionary(1)
	s := NewScanner(m)
	want := conversation(500)
	for name, element := range map[string]int{F16: 2, F32: 4} {
		t.Run(name, func(t *testing.T) {
			memory := planted(m, want, element, 300_032) // across a chunk's border
			var hits []Hit
			err := s.Scan(context.Background(), bytes.NewReader(memory), 0, uint64(len(memory)), func(h Hit) { hits = append(hits, h) })
			if err != nil {
				t.Fatal(err)
			}
			runs := s.Runs(hits)
			if len(runs) == 0 || runs[0].Address != 300_032 || runs[0].Type != name {
				t.Fatalf("%d runs, the first %+v", len(runs), runs)
			}
			if !equal(runs[0].Tokens, want) {
				t.Errorf("found %d tokens, some of them wrong", len(runs[0].Tokens))
			}
			if len(hits) != len(want) {
				t.Errorf("%d hits for %d rows", len(hits), len(want))
			}
		})
	}
}

func equal(a, b []int32) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func TestNothingIsFoundWhereNothingIs(t *testing.T) {
	s := NewScanner(dictionary(1))
	nan := bytes.Repeat([]byte{0xff}, 1<<20)
	one := bytes.Repeat([]byte{0x00, 0x3c}, 1<<19)
	for name, memory := range map[string][]byte{"zeros": make([]byte, 1<<20), "not numbers": nan, "ones": one, "other rows": planted(dictionary(2), conversation(300), 2, 0)} {
		err := s.Scan(context.Background(), bytes.NewReader(memory), 0, uint64(len(memory)), func(h Hit) { t.Errorf("%s: %+v", name, h) })
		if err != nil {
			t.Error(err)
		}
	}
}

func TestRunsAcrossGaps(t *testing.T) {
	s := NewScanner(dictionary(1))
	row := uint64(testColumns * 2)
	var hits []Hit
	for _, cell := range []uint64{0, 1, 2, 5, 6, 20, 21} {
		hits = append(hits, Hit{Address: 4096 + cell*row, Token: int32(cell), Type: F16})
	}
	runs := s.Runs(hits)
	if len(runs) != 2 || !equal(runs[0].Tokens, []int32{0, 1, 2, -1, -1, 5, 6}) || !equal(runs[1].Tokens, []int32{20, 21}) {
		t.Errorf("%+v", runs)
	}
}

func TestBadDictionary(t *testing.T) {
	for _, m := range []audit.Matrix{{Rows: 2, Cols: 64, Data: make([]float32, 3)}, {Rows: 1, Cols: 8, Data: make([]float32, 8)}} {
		err := NewScanner(m).Scan(context.Background(), bytes.NewReader(nil), 0, 1, func(Hit) {})
		if !errors.Is(err, ErrDictionary) {
			t.Errorf("%d × %d: %v", m.Rows, m.Cols, err)
		}
	}
}

func TestMain(m *testing.M) {
	if os.Getenv("KVSHIELD_TEST_HOLD") != "" {
		hold := planted(dictionary(1), conversation(200), 2, 4096)
		os.Stdout.WriteString("ready\n")
		_, _ = io.Copy(io.Discard, os.Stdin)
		runtime.KeepAlive(hold)
		return
	}
	os.Exit(m.Run())
}

func TestAnotherProcess(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "KVSHIELD_TEST_HOLD=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	s := NewScanner(dictionary(1))
	hits, err := s.Process(context.Background(), cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	// The process holds its dictionary too.
	if !slices.ContainsFunc(s.Runs(hits), func(r Run) bool { return equal(r.Tokens, conversation(200)) }) {
		t.Errorf("%d hits, and no run is the conversation", len(hits))
	}
	in.Close()
	_ = cmd.Wait()
	if _, err := s.Process(context.Background(), cmd.Process.Pid); !errors.Is(err, ErrProcess) {
		t.Errorf("of a process that is gone: %v", err)
	}
}
