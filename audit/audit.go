// Package audit attacks KV caches and says how much of the conversation came back.
//
// A [Snapshot] is a cache as an attacker finds it, [Public] what anybody computes from the public model. Put both into
// an [Evidence] and give it to one of [Attacks], or let [Evaluate] run them all and score what they guess. Package
// audit/play takes the evidence from a real engine; `kvshield audit` is the command.
//
// Limits: the attacks read layer 0, where a cached row depends on one token only, except collision, which reads any layer.
// What they do not recover somebody else's attack might. A figure of 0 is no proof; a figure of 100 is one.
//
// Promises: an attack sees no token and no key but those it says it knows (Attack.Known); every figure can be had
// on controls too, a cache of random numbers and another conversation's cache, where an honest attack is down at chance.
package audit

import (
	"context"
	"errors"
	"time"
)

// Attacker is one of docs/threat-model.md: A1 knows the public model and a snapshot of the cache, A2 knows also that it was
// permuted, A3 sees the weights in accelerator memory too, A4 also knows the first tokens.
type Attacker string

const (
	A1 Attacker = "A1"
	A2 Attacker = "A2"
	A3 Attacker = "A3"
	A4 Attacker = "A4"
)

// Attack on a cache.
type Attack struct {
	Key      string // for tables and scripts, such as "sorted-values"
	Title    string // for people
	Attacker Attacker
	Known    int // how many of the first tokens it has to be told
	// Engine says that it runs the public model for every guess, which takes time: it is run on one snapshot of
	// each mode only.
	Engine bool
	// Grows says that it gets better with a longer snapshot.
	Grows bool
	Run   func(context.Context, *Evidence) (*Guess, error)
}

// Evidence is what an attacker has.
type Evidence struct {
	Snapshot *Snapshot
	Public   *Public
	Known    []int32  // the first tokens, Attack.Known of them
	Weights  *Weights // nil for an attacker who sees no weights
	Engine   Engine   // the attacker's own, with the public model; nil: none
	// Time is how long an attack may go on that runs the engine for every guess.
	Time time.Duration
}

// Guess is what an attack makes of a snapshot.
type Guess struct {
	Tokens []int32 // for each cached token, the known ones included; negative: none found
	// Alike is set by attacks that tell equal tokens from different ones: for each pair of rows how alike they look.
	Alike func(i, j int) float64
	// Classes numbers the rows so that those taken for the same token have the same number. Set with Alike.
	Classes []int
	// Tried is how many of the tokens the attack got to; 0: all.
	Tried int
	Where string
}

// Skip is returned by an attack that has nothing to work on.
type Skip struct{ Reason string }

func (e *Skip) Error() string { return e.Reason }

// errNothing is a cache without content: an attack on it recovers nothing, and that is a result.
var errNothing = errors.New("the snapshot holds nothing but zeros")

// Attacks are all of them, from the weakest attacker to the strongest.
func Attacks() []Attack {
	list := []Attack{naiveValues, naiveKeys, sortedValues, headNorms, pairMagnitudes, gramMatrix, whitening, repetition, collision, weightMatching}
	for _, m := range []int{1, 8, 16, 32, 64, 128} {
		list = append(list, knownPrefix(m))
	}
	return append(list, selfTraining)
}
