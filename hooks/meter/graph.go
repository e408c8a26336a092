package meter

import (
	"encoding/binary"
	"time"
)

// Graph is what one computed graph cost.
type Graph struct {
	Number      uint64        // counts the graphs of the process, from 1
	Start, End  time.Duration // CLOCK_MONOTONIC, as the hook saw it
	Tokens      int
	Transitions int
	Bytes       uint64        // of payload, to the enclave
	Wait        time.Duration // of the transitions together
	Enclave     time.Duration // of it, the enclave was at work
	Parts       []Part        // whose tokens these are; nil where the engine does not say
	Detail      []Transition  // while Detail is on
	PID         int           // of the engine; the supervisor fills it in
}

// Part is how many of a graph's tokens are one sequence's, such as a llama-server's slot's.
type Part struct{ Sequence, Tokens int }

// Transition is one entry into the enclave and back.
type Transition struct {
	Layer                int
	Start, Wait, Enclave time.Duration
	Bytes                uint64
}

// Kinds of records. A graph's parts come right before it; its transitions earlier.
const (
	kindGraph      = 1
	kindParts      = 2
	kindTransition = 3

	partsOfRecord  = 7
	partsMax       = 1024
	transitionsMax = 1 << 13 // of a graph, kept
	graphsOpen     = 64      // with transitions whose end has not come
	margin         = 256     // records that the hook may be writing
)

// Graphs returns what was computed since the last call, in the order of its ends.
func (m *Meter) Graphs() []Graph {
	m.mu.Lock()
	defer m.mu.Unlock()
	written := m.long(offWritten)
	if written < m.read || written-m.read > records-margin {
		m.read = written - min(written, records-margin)
		m.parts = nil
	}
	text := make([]byte, 0, recordSize*(written-m.read))
	from := m.read
	for at := from; at < written; at++ {
		start := offRing + int(at%records)*recordSize
		text = append(text, m.memory[start:start+recordSize]...)
	}
	m.read = written
	// What the hook has written over meanwhile is not what it was.
	if again := m.long(offWritten); again-from > records-margin {
		spoiled := min(again-from-(records-margin), written-from)
		text = text[recordSize*spoiled:]
		m.parts = nil
	}
	var list []Graph
	for ; len(text) > 0; text = text[recordSize:] {
		if g, ok := m.take(record(text[:recordSize])); ok {
			list = append(list, g)
		}
	}
	return list
}

type record []byte

func (r record) u32(at int) uint32             { return binary.LittleEndian.Uint32(r[at:]) }
func (r record) u64(at int) uint64             { return binary.LittleEndian.Uint64(r[at:]) }
func (r record) duration(at int) time.Duration { return time.Duration(r.u64(at) & (1<<63 - 1)) }

// take is true with the record that ends a graph.
func (m *Meter) take(r record) (Graph, bool) {
	switch binary.LittleEndian.Uint16(r) {
	case kindParts:
		n := min(int(binary.LittleEndian.Uint16(r[2:])), partsOfRecord)
		for i := range n {
			if len(m.parts) < partsMax {
				m.parts = append(m.parts, Part{int(int32(r.u32(8 + 8*i))), int(r.u32(12 + 8*i))})
			}
		}
	case kindTransition:
		number := r.u64(40)
		list, open := m.detail[number]
		if !open && len(m.detail) >= graphsOpen {
			clear(m.detail)
		}
		if len(list) < transitionsMax {
			m.detail[number] = append(list, Transition{int(r.u32(4)), r.duration(8), r.duration(16), r.duration(24), r.u64(32)})
		}
	case kindGraph:
		g := Graph{Number: r.u64(56), Start: r.duration(8), End: r.duration(16), Tokens: int(r.u32(4)), Transitions: int(r.u32(24)),
			Wait: r.duration(32), Enclave: r.duration(40), Bytes: r.u64(48)}
		if len(m.parts) == int(r.u32(28)) { // else some of them were lost
			g.Parts = m.parts
		}
		g.Detail = m.detail[g.Number]
		delete(m.detail, g.Number)
		m.parts = nil
		if g.Number > m.number+1 {
			m.lost += g.Number - m.number - 1
		}
		m.number = g.Number
		return g, true
	}
	return Graph{}, false
}
