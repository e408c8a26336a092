package audit

import (
	"cmp"
	"slices"
)

// Score compares guesses with what was really said. Only here do the two meet.
type Score struct {
	Rate    float64 // share of the tokens that the attack was not told
	Tokens  int     // how many those are
	Right   []bool  // of each of them
	Figures map[string]float64
}

// ScoreOf scores a guess of which the first `known` tokens were told.
func ScoreOf(g *Guess, truth []int32, known int) Score {
	end := len(truth)
	if g.Tried > 0 {
		end = min(end, max(g.Tried, known))
	}
	s := Score{Tokens: end - known, Right: make([]bool, end-known)}
	hits := 0
	for i := known; i < end; i++ {
		if i < len(g.Tokens) && g.Tokens[i] == truth[i] {
			s.Right[i-known] = true
			hits++
		}
	}
	if s.Tokens > 0 {
		s.Rate = float64(hits) / float64(s.Tokens)
	}
	if g.Alike != nil {
		s.Figures = equality(g, truth)
	}
	return s
}

// Chance is the share of the most frequent token: what guessing that one everywhere recovers.
func Chance(truth []int32) float64 {
	count := map[int32]int{}
	most := 0
	for _, t := range truth {
		count[t]++
		most = max(most, count[t])
	}
	return float64(most) / float64(max(len(truth), 1))
}

// equality says how well pairs of equal tokens were told from pairs of different ones: the area under the receiver's curve by how
// alike they look, and F1 of the classes.
func equality(g *Guess, truth []int32) map[string]float64 {
	type scored struct {
		alike float64
		equal bool
	}
	var pairs []scored
	var right, taken, equal float64
	for i := range truth {
		for j := range i {
			same, guessed := truth[i] == truth[j], g.Classes[i] == g.Classes[j]
			pairs = append(pairs, scored{g.Alike(i, j), same})
			right += indicator(same && guessed)
			taken += indicator(guessed)
			equal += indicator(same)
		}
	}
	slices.SortFunc(pairs, func(a, b scored) int { return cmp.Compare(a.alike, b.alike) })
	var sum float64 // of the ranks of equal pairs; ties share their mean rank
	for i := 0; i < len(pairs); {
		j, same := i, 0.0
		for ; j < len(pairs) && pairs[j].alike == pairs[i].alike; j++ {
			same += indicator(pairs[j].equal)
		}
		sum += same * float64(i+j+1) / 2
		i = j
	}
	figures := map[string]float64{"f1": 2 * right / max(taken+equal, 1)}
	if different := float64(len(pairs)) - equal; equal > 0 && different > 0 {
		figures["auc"] = (sum - equal*(equal+1)/2) / (equal * different)
	}
	return figures
}

func indicator(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
