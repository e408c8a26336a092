package audit

import "time"

// Schema names the structure of a [Report] in JSON. It changes when a field changes its meaning or goes away; docs/audit.md
// describes the fields.
const Schema = "kvshield.audit/1"

// Report is what an audit found.
type Report struct {
	Schema  string    `json:"schema"`
	Created time.Time `json:"created"`
	Engine  string    `json:"engine"` // as the engine names itself
	Model   Model     `json:"model"`
	// CacheType is the type of the cache's elements that the engine was asked for.
	CacheType    string `json:"cache_type"`
	Conversation string `json:"conversation"` // "built-in", or the name of the user's file
	Runs         []Run  `json:"runs"`         // one for each mode
}

// Model is the shape of what was audited.
type Model struct {
	Name         string `json:"name"`
	Architecture string `json:"architecture"`
	Layers       int    `json:"layers"`
	HeadsKV      int    `json:"heads_kv"`
	HeadDim      int    `json:"head_dim"`
	Vocabulary   int    `json:"vocabulary"`
}

// Run is one conversation, played on an engine in one mode, and what was recovered of it.
type Run struct {
	Mode string `json:"mode"` // "off" is the stock engine
	TEE  string `json:"tee"`  // what protects the enclave; empty in mode off
	// Tokens that the cache held, and the text of each. What a token's text is can depend on its neighbours; joined they
	// are the conversation.
	Tokens int      `json:"tokens"`
	Truth  []string `json:"truth"`
	// Chance is the share of the most frequent token: what somebody recovers who knows nothing but that one.
	Chance  float64  `json:"chance"`
	Results []Result `json:"results"`
	// Curves are recovery against the length of the snapshot, for the attacks in whose nature it is.
	Curves []Line `json:"curves"`
	// Clear lists what of the conversation lay open beside the cache, such as the token ids in a slot file. No attack uses it.
	Clear []string `json:"clear"`
	Notes []string `json:"notes"`
}

// Result of one attack on one snapshot.
type Result struct {
	Attack   string  `json:"attack"`   // key, such as "sorted-values"
	Title    string  `json:"title"`    // for people
	Attacker string  `json:"attacker"` // A1 to A4 of docs/threat-model.md
	Source   Source  `json:"source"`   // of the snapshot
	Known    int     `json:"known"`    // tokens that the attacker was told: the first ones
	Tokens   int     `json:"tokens"`   // tokens attacked, the known ones left out
	Skipped  string  `json:"skipped"`  // why the attack was not run; the figures below mean nothing then
	Rate     float64 `json:"rate"`     // share of the attacked tokens that was recovered, 0 to 1
	// Random and Other are the same attack on controls: a cache of random numbers, and the cache of another conversation.
	// An honest attack recovers from them what chance gives. Null: not run.
	Random *float64 `json:"random"`
	Other  *float64 `json:"other"`
	// Figures that are not a share of tokens: "auc" and "f1" of telling equal tokens from different ones.
	Figures map[string]float64 `json:"figures,omitempty"`
	// Guess is the recovered text, aligned with Run.Truth[Known:]: the text of each guessed token and whether it is the right one.
	// An attack that finds no token at a place says "".
	Guess   []Piece `json:"guess"`
	Where   string  `json:"where"` // where the leak was: layer, keys or values, addresses
	Seconds float64 `json:"seconds"`
}

// Piece of a recovered text.
type Piece struct {
	Text  string `json:"text"`
	Right bool   `json:"right"`
}

// Line is how much one attack recovers as the snapshot grows.
type Line struct {
	Attack string  `json:"attack"`
	Title  string  `json:"title"`
	Points []Point `json:"points"`
}

// Point of a curve.
type Point struct {
	Tokens int     `json:"tokens"`
	Rate   float64 `json:"rate"`
}

// Worst is the largest share that any attack recovered, and the attack; 0 when none ran.
func (r *Run) Worst() (rate float64, attack string) {
	for _, res := range r.Results {
		if res.Skipped == "" && res.Rate > rate {
			rate, attack = res.Rate, res.Attack
		}
	}
	return rate, attack
}
