package attribution

import (
	"testing"
	"time"

	"github.com/kvshield/kvshield/hooks/meter"
)

const ms = time.Millisecond

// bench computes graphs one after another: each takes 10 ms, of which the engine waits 4 and the enclave works 2.
type bench struct {
	now    time.Duration
	number uint64
}

func (b *bench) graph(parts ...meter.Part) meter.Graph {
	g := meter.Graph{Number: b.number + 1, Start: b.now, End: b.now + 10*ms, Transitions: 5, Wait: 4 * ms, Enclave: 2 * ms, Parts: parts, PID: 1}
	for _, p := range parts {
		g.Tokens += p.Tokens
	}
	g.Bytes = 1000 * uint64(g.Tokens)
	b.now, b.number = g.End, g.Number
	return g
}

func in(sequence, tokens int) meter.Part { return meter.Part{Sequence: sequence, Tokens: tokens} }

func ledger(accounts ...*Account) *Ledger {
	l := &Ledger{}
	for i, a := range accounts {
		l.Enter(a)
		l.Assign(i, a)
	}
	return l
}

func check(t *testing.T, name string, p Phase, graphs, tokens int) {
	t.Helper()
	if p.Graphs != graphs || p.Tokens != tokens || p.Transitions != uint64(5*graphs) {
		t.Errorf("%s: %d graphs, %d tokens, %d transitions; want %d, %d, %d", name, p.Graphs, p.Tokens, p.Transitions, graphs, tokens, 5*graphs)
	}
}

func TestSeveralSlotsInOneBatch(t *testing.T) {
	var ann, bob Account
	var b bench
	l := ledger(&ann, &bob)
	var tokens []Token
	l.Decoded = func(_ *Account, t Token) { tokens = append(tokens, t) }
	l.Book([]meter.Graph{b.graph(in(0, 8)), b.graph(in(0, 1), in(1, 3)), b.graph(in(0, 1), in(1, 1))})
	check(t, "ann's prefill", ann.Prefill, 1, 8)
	check(t, "ann's decode", ann.Decode, 2, 2)
	check(t, "bob's prefill", bob.Prefill, 1, 3)
	check(t, "bob's decode", bob.Decode, 1, 1)
	if len(tokens) != 3 {
		t.Fatalf("%d tokens", len(tokens))
	}
	// The last graph had two tokens: each paid half of it, and each waited for all of it.
	if got := tokens[2]; got.Bytes != 1000 || got.Wait != 2*ms || got.Enclave != ms || got.Took != 10*ms || got.Share != 0.4 || got.Transitions != 5 {
		t.Errorf("%+v", got)
	}
	if all := ann.Prefill.Wait + ann.Decode.Wait + bob.Prefill.Wait + bob.Decode.Wait; all != 12*ms {
		t.Errorf("together they waited %v", all)
	}
	if ann.Prefill.Start != 0 || ann.Prefill.End != 10*ms || ann.Decode.Start != 10*ms || ann.Decode.End != 30*ms {
		t.Errorf("%+v", ann)
	}
}

func TestATokenWaitsFromItsOwnGraphToItsOwnNext(t *testing.T) {
	var ann, bob Account
	var b bench
	l := ledger(&ann, &bob)
	var took []time.Duration
	l.Decoded = func(_ *Account, t Token) { took = append(took, t.Took) }
	l.Book([]meter.Graph{b.graph(in(0, 4)), b.graph(in(1, 64)), b.graph(in(0, 1))})
	if len(took) != 1 || took[0] != 20*ms {
		t.Errorf("took %v", took)
	}
}

func TestPrefillInChunks(t *testing.T) {
	var ann Account
	var b bench
	ledger(&ann).Book([]meter.Graph{b.graph(in(0, 512)), b.graph(in(0, 512)), b.graph(in(0, 40)), b.graph(in(0, 1))})
	check(t, "prefill", ann.Prefill, 3, 1064)
	check(t, "decode", ann.Decode, 1, 1)
}

// The last chunk of a prompt may be one token, and look as if it had been decoded.
func TestPromptThatEndsInOneToken(t *testing.T) {
	var ann Account
	var b bench
	ledger(&ann).Book([]meter.Graph{b.graph(in(0, 512)), b.graph(in(0, 1)), b.graph(in(0, 1)), b.graph(in(0, 1))})
	ann.Settle(513)
	check(t, "prefill", ann.Prefill, 2, 513)
	check(t, "decode", ann.Decode, 2, 2)
	if ann.Prefill.End != 20*ms || ann.Decode.Start != 20*ms || ann.Decode.Bytes != 2000 || ann.Decode.Wait != 8*ms {
		t.Errorf("%+v", ann)
	}
	ann.Settle(600) // an engine that says more than was seen
	check(t, "prefill", ann.Prefill, 2, 513)
	ann.Settle(515)
	check(t, "prefill", ann.Prefill, 4, 515)
	if ann.Decode != (Phase{}) {
		t.Errorf("%+v", ann.Decode)
	}
}

func TestPromptOfOneToken(t *testing.T) {
	var ann Account
	var b bench
	ledger(&ann).Book([]meter.Graph{b.graph(in(0, 1)), b.graph(in(0, 1))})
	check(t, "prefill", ann.Prefill, 1, 1)
	check(t, "decode", ann.Decode, 1, 1)
}

// Slots are used by one request after another; what a request that was cancelled left running is still its own.
func TestSlotReuse(t *testing.T) {
	var ann, bob Account
	var b bench
	l := ledger(&ann)
	l.Book([]meter.Graph{b.graph(in(0, 4)), b.graph(in(0, 1))})
	l.Enter(&bob)
	l.Book([]meter.Graph{b.graph(in(0, 1))})
	l.Assign(0, &bob)
	l.Book([]meter.Graph{b.graph(in(0, 2)), b.graph(in(0, 1))})
	l.Leave(&ann)
	l.Book([]meter.Graph{b.graph(in(0, 1))})
	check(t, "ann's decode", ann.Decode, 2, 2)
	check(t, "bob's prefill", bob.Prefill, 1, 2)
	check(t, "bob's decode", bob.Decode, 2, 2)
}

func TestWhatIsNobodys(t *testing.T) {
	var ann, bob Account
	var b bench
	l := ledger(&ann, &bob)
	var classes []Class
	l.Booked = func(_ meter.Graph, c Class) { classes = append(classes, c) }
	nameless := b.graph(in(0, 2))
	nameless.Parts = nil
	l.Book([]meter.Graph{b.graph(in(7, 3)), nameless, b.graph(in(0, 2), in(7, 1))})
	l.Leave(&bob)
	l.Leave(&ann)
	l.Book([]meter.Graph{b.graph(in(0, 1)), nameless})
	check(t, "ann's", ann.Prefill, 1, 2)
	check(t, "bob's", bob.Prefill, 0, 0)
	for i, want := range []Class{Unknown, Unknown, Prefill, Unknown, Unknown} {
		if classes[i] != want {
			t.Errorf("graph %d is %v, want %v", i, classes[i], want)
		}
	}
}

func TestTheOnlyRequest(t *testing.T) {
	var ann, bob Account
	var b bench
	l := &Ledger{}
	l.Enter(&ann)
	nameless := b.graph(in(3, 5))
	nameless.Parts = nil
	l.Book([]meter.Graph{nameless, b.graph(in(3, 1))})
	check(t, "prefill", ann.Prefill, 2, 6) // two sequences, for all that is known
	l.Enter(&bob)
	l.Book([]meter.Graph{b.graph(in(3, 1))})
	if bob.Prefill.Tokens+bob.Decode.Tokens != 0 || ann.Decode.Tokens != 0 {
		t.Errorf("%+v, %+v", ann, bob)
	}
}

// One request among others may have a sequence that the engine chose.
func TestTheOnlyRequestWithoutASequence(t *testing.T) {
	var ann, bob, cid Account
	var b bench
	l := ledger(&ann)
	l.Enter(&bob)
	l.Book([]meter.Graph{b.graph(in(0, 2), in(5, 3))})
	l.Enter(&cid)
	l.Book([]meter.Graph{b.graph(in(5, 1))})
	l.Leave(&cid)
	l.Assign(5, nil)
	l.Book([]meter.Graph{b.graph(in(5, 1))})
	check(t, "ann's", ann.Prefill, 1, 2)
	check(t, "bob's", bob.Prefill, 1, 3)
	check(t, "bob's decode", bob.Decode, 0, 0)
}

func TestAllSlots(t *testing.T) {
	var ann, bob Account
	var b bench
	l := ledger(&bob)
	l.Leave(&bob)
	l.Enter(&ann)
	l.Assign(All, &ann)
	l.Book([]meter.Graph{b.graph(in(0, 4), in(1, 4)), b.graph(in(0, 1), in(1, 1))})
	check(t, "prefill", ann.Prefill, 1, 8)
	check(t, "decode", ann.Decode, 1, 2)
	l.Assign(0, nil)
	l.Book([]meter.Graph{b.graph(in(0, 1))})
	check(t, "decode", ann.Decode, 1, 2)
}

func TestStepsAreBounded(t *testing.T) {
	var ann Account
	var b bench
	l := ledger(&ann)
	for range 2 * maxSteps {
		g := b.graph(in(0, 1))
		g.Detail = []meter.Transition{{Layer: 0}}
		l.Book([]meter.Graph{g})
	}
	if len(ann.Steps) != maxSteps || ann.Steps[0].Decode || !ann.Steps[1].Decode {
		t.Errorf("%d steps", len(ann.Steps))
	}
}
