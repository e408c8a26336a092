// Package attribution books what each graph cost to the requests whose tokens were in it.
//
// Start with a [Ledger]: [Ledger.Enter] a request, [Ledger.Assign] it the engine's sequences that are its own from now on, and
// [Ledger.Book] the graphs that were computed since the last call, each time before anything of that changes. [Ledger.Leave] when
// the request is over.
//
// The rules: a graph's transitions count for every request that took part in it; its bytes and times are divided by its tokens. A
// graph that does not say whose tokens it had belongs to the only request there is, else to nobody. A sequence that was assigned to nobody
// yet belongs to the only request that has no sequence of its own, else to nobody.
//
// A ledger is not for several goroutines at a time.
package attribution

import (
	"time"

	"github.com/kvshield/kvshield/hooks/meter"
)

// All sequences, for [Ledger.Assign].
const All = -1

// Phase of a request: its prefill or its decode.
type Phase struct {
	Graphs, Tokens int
	Transitions    uint64
	Bytes          float64
	Wait, Enclave  time.Duration // the request's part of them
	Waited         time.Duration // while others' tokens were in the graph, too
	Start, End     time.Duration // of the first and the last graph; both zero while there is none
}

// Token is what one decoded token cost: the graph that it was computed in, divided by the tokens in there.
type Token struct {
	Transitions   int
	Bytes         float64
	Wait, Enclave time.Duration
	Took          time.Duration // since the graph before of the same sequence ended
	Share         float64       // of that time, the part in which the engine waited for the enclave; 0 to 1
	Start, End    time.Duration // of its graph

	waited time.Duration
}

// Account is what was booked to one request. Its zero value is an empty one.
type Account struct {
	Prefill, Decode Phase
	Steps           []Step // the first ones, those with Detail only

	last  map[source]time.Duration // when a sequence's graph before ended
	early []Token                  // the first decoded tokens, in case they were the end of the prompt
}

// Step is one graph of a request, layer by layer.
type Step struct {
	Decode bool
	Graph  meter.Graph
}

const (
	maxSteps = 64
	maxEarly = 16
)

type source struct{ pid, sequence int }

// Class of a graph: what its tokens were.
type Class int

// Classes. A graph in which anybody's prompt was computed is Prefill.
const (
	Unknown Class = iota
	Prefill
	Decode
)

func (c Class) String() string { return [...]string{"unknown", "prefill", "decode"}[c] }

// Ledger of the requests in flight.
type Ledger struct {
	// Booked, where not nil, is told of each graph, Decoded of each decoded token that is somebody's.
	Booked  func(meter.Graph, Class)
	Decoded func(*Account, Token)

	present map[*Account]bool
	owners  map[int]*Account
}

// Enter a request into the ledger.
func (l *Ledger) Enter(a *Account) {
	l.begin()
	l.present[a] = true
}

func (l *Ledger) begin() {
	if l.present == nil {
		l.present, l.owners = map[*Account]bool{}, map[int]*Account{}
	}
}

// Leave the ledger. What is computed from now on is not the request's.
func (l *Ledger) Leave(a *Account) {
	delete(l.present, a)
	for sequence, owner := range l.owners {
		if owner == a {
			delete(l.owners, sequence)
		}
	}
}

// Assign a sequence to a request that is in the ledger, or to nobody (nil). What is booked from now on for this sequence is its.
func (l *Ledger) Assign(sequence int, a *Account) {
	l.begin()
	if sequence == All {
		clear(l.owners)
	}
	delete(l.owners, All)
	if !l.present[a] {
		a = nil
	}
	l.owners[sequence] = a
}

// owner of a sequence; nil when that is not known.
func (l *Ledger) owner(sequence int) *Account {
	for _, s := range [...]int{sequence, All} {
		if a, known := l.owners[s]; known {
			return a
		}
	}
	return l.only()
}

// only is the request that alone has no sequence of its own: one that has, has nothing to do with others.
func (l *Ledger) only() *Account {
	var only *Account
	for a := range l.present {
		switch {
		case l.owns(a):
		case only != nil:
			return nil
		default:
			only = a
		}
	}
	return only
}

func (l *Ledger) owns(a *Account) bool {
	for _, owner := range l.owners {
		if owner == a {
			return true
		}
	}
	return false
}

// Book graphs in the order in which they were computed.
func (l *Ledger) Book(graphs []meter.Graph) {
	for _, g := range graphs {
		class := l.book(g)
		if l.Booked != nil {
			l.Booked(g, class)
		}
	}
}

func (l *Ledger) book(g meter.Graph) Class {
	if len(g.Parts) == 0 {
		if len(l.present) != 1 {
			return Unknown
		}
		for a := range l.present {
			return l.take(a, g, meter.Part{Sequence: All, Tokens: g.Tokens}, true)
		}
	}
	class, counted := Unknown, map[*Account]bool{}
	for _, p := range g.Parts {
		a := l.owner(p.Sequence)
		if a == nil {
			continue
		}
		if c := l.take(a, g, p, !counted[a]); class != Prefill {
			class = c
		}
		counted[a] = true
	}
	return class
}

// take books the part of a graph to an account; first says that it is the account's first part of this graph.
func (l *Ledger) take(a *Account, g meter.Graph, p meter.Part, first bool) Class {
	t := tokenOf(g)
	from := source{g.PID, p.Sequence}
	before, known := a.last[from]
	if a.last == nil {
		a.last = map[source]time.Duration{}
	}
	a.last[from] = g.End
	if !known || p.Tokens > 1 {
		a.Prefill.add(t, p.Tokens, first)
		a.step(g, false, first)
		return Prefill
	}
	if t.Took = g.End - before; t.Took > 0 {
		t.Share = min(1, float64(g.Wait)/float64(t.Took))
	}
	a.Decode.add(t, p.Tokens, first)
	a.step(g, true, first)
	if len(a.early) < maxEarly {
		a.early = append(a.early, t)
	}
	if l.Decoded != nil {
		l.Decoded(a, t)
	}
	return Decode
}

// tokenOf is what one token of the graph cost.
func tokenOf(g meter.Graph) Token {
	n := max(1, g.Tokens)
	return Token{Transitions: g.Transitions, Bytes: float64(g.Bytes) / float64(n), Wait: g.Wait / time.Duration(n), Enclave: g.Enclave / time.Duration(n), Start: g.Start, End: g.End, waited: g.Wait}
}

func (p *Phase) add(t Token, tokens int, counts bool) {
	if p.Graphs == 0 {
		p.Start = t.Start
	}
	if counts {
		p.Graphs++
		p.Transitions += uint64(t.Transitions)
		p.Waited += t.waited
	}
	p.Tokens += tokens
	p.Bytes += t.Bytes * float64(tokens)
	p.Wait += t.Wait * time.Duration(tokens)
	p.Enclave += t.Enclave * time.Duration(tokens)
	p.End = max(p.End, t.End)
}

// Join adds another phase of the same request.
func (p *Phase) Join(o Phase) {
	if p.Graphs == 0 || o.Graphs > 0 && o.Start < p.Start {
		p.Start = o.Start
	}
	p.Graphs += o.Graphs
	p.Tokens += o.Tokens
	p.Transitions += o.Transitions
	p.Bytes += o.Bytes
	p.Wait += o.Wait
	p.Enclave += o.Enclave
	p.Waited += o.Waited
	p.End = max(p.End, o.End)
}

func (a *Account) step(g meter.Graph, decode, first bool) {
	if first && len(g.Detail) > 0 && len(a.Steps) < maxSteps {
		a.Steps = append(a.Steps, Step{decode, g})
	}
}

// Settle is told how many tokens of the prompt the engine computed, where it says so. A prompt's last token may have been alone in a graph,
// and looked like a decoded one. Where not all of the request's graphs were booked, that cannot be told.
func (a *Account) Settle(prompt int) {
	if a.Prefill.Tokens+a.Decode.Tokens < prompt {
		return
	}
	for len(a.early) > 0 && a.Prefill.Tokens < prompt {
		t := a.early[0]
		a.early = a.early[1:]
		a.Decode.remove(t)
		a.Prefill.add(t, 1, true)
		if len(a.early) > 0 {
			a.Decode.Start = a.early[0].Start
		}
	}
}

func (p *Phase) remove(t Token) {
	p.Graphs--
	p.Tokens--
	p.Transitions -= uint64(t.Transitions)
	p.Bytes -= t.Bytes
	p.Wait -= t.Wait
	p.Waited -= t.waited
	p.Enclave -= t.Enclave
	if p.Graphs == 0 {
		*p = Phase{}
	}
}
