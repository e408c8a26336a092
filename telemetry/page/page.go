// Package page is the page at /kvshield/: what the shield costs now, in any browser, without anything beside kvshield.
//
// Start with [Handlers]: what it returns goes into proxy.Config.Own. The caller says how things stand by a [Snapshot], once a
// second while somebody looks; everything that is shown comes from there.
//
// Limits: a page knows the past only since it was opened. At most [MaxStreams] look at a time.
//
// Promises: the page asks no other host for anything and runs no script but its own files. It is the same for everybody: what is
// worth a key is in the stream of events only. A reader that leaves, or does not read, costs nothing after a few seconds.
package page

import "time"

// Snapshot is how things stand. Nothing in it may be any part of a request, of an answer, or a key.
type Snapshot struct {
	Time      time.Time `json:"time"`
	Mode      string    `json:"mode"`
	TEE       string    `json:"tee"`      // the backend; empty in mode off
	Hardware  bool      `json:"hardware"` // whether hardware protects the enclave
	Statement string    `json:"statement"`
	Model     string    `json:"model"`
	Ready     bool      `json:"ready"`
	Reason    string    `json:"reason"` // why not ready

	Requests       Requests     `json:"requests"`
	Tokens         Tokens       `json:"tokens"`
	Share          Distribution `json:"share"`           // the enclave's share of a decoded token's time, 0 to 1, last minute
	Transition     Distribution `json:"transition"`      // seconds that the engine waited for one, last minute
	TransitionRate float64      `json:"transition_rate"` // per second
	BytesRate      float64      `json:"bytes_rate"`      // per second
	Layers         []Layer      `json:"layers"`
	Errors         []Error      `json:"errors"` // the last ones, newest last
}

// Requests are those for the engine: pages of kvshield's own are none.
type Requests struct {
	Active int    `json:"active"`
	Queued int    `json:"queued"`
	Total  uint64 `json:"total"`
	Failed uint64 `json:"failed"`
}

// Tokens that the engine decoded.
type Tokens struct {
	Rate  float64 `json:"rate"` // per second, over the last five
	Total uint64  `json:"total"`
}

// Distribution of values in buckets. Counts has one number more than Bounds, which rise: Counts[i] is how many values were at most
// Bounds[i] and above the bound before; the last one is those above all bounds. Without a count there are no quantiles either.
type Distribution struct {
	P50    float64   `json:"p50"`
	P99    float64   `json:"p99"`
	Bounds []float64 `json:"bounds"`
	Counts []uint64  `json:"counts"`
}

// Layer of the model: what one of its transitions took, in seconds, on average over the last minute.
type Layer struct {
	Wait    float64 `json:"wait"`    // the engine waited, copies included
	Enclave float64 `json:"enclave"` // of it, the enclave worked
}

// Error is one of the last errors.
type Error struct {
	Time    time.Time `json:"time"`
	Kind    string    `json:"kind"`
	Message string    `json:"message"`
}
