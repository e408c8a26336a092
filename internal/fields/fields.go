// Package fields picks a few scalar members out of JSON while it passes, and keeps nothing else of it.
//
// Start with [NewSet], once for each kind of text; then feed a [Picker] with the text in whatever pieces it comes. Several values one
// after another, as in newline-delimited JSON, are read as they come.
//
// Limits: a string is found only when it is plain (no escapes) and at most [MaxString] bytes long; what is nested deeper than
// [MaxDepth] is not looked at, nor is anything behind text that is no JSON, until [Picker.Reset].
//
// Promise: besides the values that it reports, a picker never holds more than MaxString bytes of the text, and those only until the next value.
package fields

import "strings"

// Bounds of what is looked at.
const (
	MaxString = 128
	MaxDepth  = 32
)

// Set is which members are looked for.
type Set struct{ root *node }

type node struct {
	id      int // of the member that ends here, -1 for none
	members map[string]*node
	items   *node // of an array
}

// NewSet takes paths such as "usage.prompt_tokens" or "choices.*.finish_reason", where * is any item of an array. A member is reported by
// the index of its path.
func NewSet(paths ...string) *Set {
	root := &node{id: -1}
	for id, path := range paths {
		n := root
		for name := range strings.SplitSeq(path, ".") {
			n = n.child(name)
		}
		n.id = id
	}
	return &Set{root}
}

func (n *node) child(name string) *node {
	if name == "*" {
		if n.items == nil {
			n.items = &node{id: -1}
		}
		return n.items
	}
	if n.members == nil {
		n.members = map[string]*node{}
	}
	if n.members[name] == nil {
		n.members[name] = &node{id: -1}
	}
	return n.members[name]
}

type state byte

const (
	value  state = iota // a value may begin
	key                 // a name may begin, or the object end
	colon               // a name has ended
	after               // a value has ended
	text                // in a string
	escape              // behind a backslash in a string
	word                // in a number, true, false or null
	lost                // this is no JSON
)

type frame struct {
	node  *node // what is looked for in here; nil for nothing
	array bool
}

// Picker reads one text. It is not for several goroutines at a time.
type Picker struct {
	set   *Set
	found func(id int, value []byte, quoted bool)
	state state
	named bool  // the string is a name
	at    *node // what the value that comes is looked at for
	depth int
	stack [MaxDepth]frame
	kept  [MaxString]byte
	n     int
	over  bool // the string is no plain, short one
}

// NewPicker reports each member of the set. The bytes are good only during the call.
func NewPicker(s *Set, found func(id int, value []byte, quoted bool)) *Picker {
	return &Picker{set: s, found: found, at: s.root}
}

// Reset begins a new text.
func (p *Picker) Reset() { p.state, p.at, p.depth = value, p.set.root, 0 }

// Lost says that the text is no JSON, or nested too deep.
func (p *Picker) Lost() bool { return p.state == lost }

// Feed reads on.
func (p *Picker) Feed(b []byte) {
	for i := 0; i < len(b) && p.state != lost; i++ {
		switch p.state {
		case text:
			i = p.inText(b, i)
		case escape:
			p.state = text
		case word:
			if !p.inWord(b[i]) {
				i--
			}
		default:
			p.between(b[i])
		}
	}
}

// inText reads on in a string and returns where it stopped.
func (p *Picker) inText(b []byte, i int) int {
	for ; i < len(b); i++ {
		switch c := b[i]; {
		case c == '"':
			p.endText()
			return i
		case c == '\\':
			p.over, p.state = true, escape
			return i
		default:
			p.keep(c)
		}
	}
	return i
}

func (p *Picker) keep(c byte) {
	if p.over {
		return
	}
	if p.n == MaxString {
		p.over = true
		return
	}
	p.kept[p.n] = c
	p.n++
}

func (p *Picker) endText() {
	if !p.named {
		p.report(true)
		return
	}
	p.state, p.at = colon, nil
	if in := p.stack[p.depth-1].node; in != nil && !p.over {
		p.at = in.members[string(p.kept[:p.n])]
	}
}

// report ends a scalar value.
func (p *Picker) report(quoted bool) {
	if p.at != nil && p.at.id >= 0 && !p.over {
		p.found(p.at.id, p.kept[:p.n], quoted)
	}
	p.ended()
}

// ended is after any value.
func (p *Picker) ended() {
	p.state, p.at = after, nil
	if p.depth == 0 {
		p.state, p.at = value, p.set.root
	}
}

// inWord is false for a byte that is no part of a number or a literal.
func (p *Picker) inWord(c byte) bool {
	if c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c == '.' || c == '-' || c == '+' || c == 'E' {
		p.keep(c)
		return true
	}
	p.report(false)
	return false
}

func (p *Picker) between(c byte) {
	switch {
	case c == ' ' || c == '\t' || c == '\n' || c == '\r':
	case c == '"' && (p.state == value || p.state == key):
		p.named, p.n = p.state == key, 0
		p.state, p.over = text, !p.named && (p.at == nil || p.at.id < 0) || p.named && p.stack[p.depth-1].node == nil
	case c == ':' && p.state == colon:
		p.state = value
	case c == ',' && p.state == after:
		p.next()
	case (c == '{' || c == '[') && p.state == value:
		p.enter(c == '[')
	case (c == '}' || c == ']') && p.depth > 0 && p.state != colon:
		p.depth--
		p.ended()
	case p.state == value:
		p.state, p.n, p.over = word, 0, false
		if !p.inWord(c) {
			p.state = lost
		}
	default:
		p.state = lost
	}
}

func (p *Picker) next() {
	in := p.stack[p.depth-1]
	p.state = key
	if in.array {
		p.state = value
		if in.node != nil {
			p.at = in.node.items
		}
	}
}

func (p *Picker) enter(array bool) {
	if p.depth == MaxDepth {
		p.state = lost
		return
	}
	p.stack[p.depth] = frame{p.at, array}
	p.depth++
	p.state = key
	if array {
		p.state = value
		if p.at != nil {
			p.at = p.at.items
		}
	}
}
