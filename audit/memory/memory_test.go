package memory

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/kvshield/kvshield/audit"
)

const (
	testTokens  = 3000
	testColumns = 64
)

// childMode tells the test binary to be another process: see process_test.go.
const childMode = "KVSHIELD_TEST_MEMORY"

func TestMain(m *testing.M) {
	if mode := os.Getenv(childMode); mode != "" {
		child(mode)
		return
	}
	os.Exit(m.Run())
}

// rowOf is the row of a token, without its dictionary.
func rowOf(seed uint64, token, columns int) []float32 {
	r := rand.New(rand.NewPCG(seed, uint64(token)))
	row := make([]float32, columns)
	for i := range row {
		row[i] = float32(r.NormFloat64())
	}
	return row
}

func dictionary(seed uint64, rows, columns int) audit.Matrix {
	m := audit.NewMatrix(rows, columns)
	for i := range rows {
		copy(m.Row(i), rowOf(seed, i, columns))
	}
	return m
}

// put writes a row into memory as numbers of a type, with noise of the given relative size added.
func put(memory []byte, row []float32, kind string, noise float64, r *rand.Rand) {
	squares := 0.0
	for _, v := range row {
		squares += float64(v) * float64(v)
	}
	noise *= math.Sqrt(squares / float64(len(row)))
	for i, v := range row {
		if noise > 0 {
			v += float32(noise * r.NormFloat64())
		}
		if kind == F16 {
			binary.LittleEndian.PutUint16(memory[2*i:], toHalf(v))
		} else {
			binary.LittleEndian.PutUint32(memory[4*i:], math.Float32bits(v))
		}
	}
}

// toHalf rounds half up; what is too small becomes zero.
func toHalf(v float32) uint16 {
	b := math.Float32bits(v) + 1<<12
	exponent := int(b>>23&255) - 112
	if exponent <= 0 {
		return uint16(b >> 31 << 15)
	}
	return uint16(b>>31<<15 | uint32(exponent)<<10 | b>>13&1023)
}

func rowBytes(kind string, columns int) int {
	if kind == F16 {
		return 2 * columns
	}
	return 4 * columns
}

func random(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 7))
	memory := make([]byte, size)
	for i := 0; i+8 <= size; i += 8 {
		binary.LittleEndian.PutUint64(memory[i:], r.Uint64())
	}
	return memory
}

func conversation(n int) []int32 {
	tokens := make([]int32, n)
	for i := range tokens {
		tokens[i] = int32(i * 37 % testTokens)
	}
	return tokens
}

// plant writes the rows of a conversation, one behind the other.
func plant(memory []byte, m audit.Matrix, tokens []int32, kind string, noise float64) {
	r := rand.New(rand.NewPCG(5, 5))
	for i, t := range tokens {
		put(memory[i*rowBytes(kind, m.Cols):], m.Row(int(t)), kind, noise, r)
	}
}

func scanAll(t *testing.T, s *Scanner, memory []byte, start uint64) (hits []Hit) {
	t.Helper()
	err := s.Scan(t.Context(), bytes.NewReader(memory), start, uint64(len(memory)), func(h Hit) { hits = append(hits, h) })
	if err != nil {
		t.Fatal(err)
	}
	return hits
}
