// Package policy refuses the requests that would defeat the shield, unless they are allowed by name.
//
// It reads a path more loosely than any engine does: case, doubled and trailing slashes, dots, percent signs encoded once or more, and a prefix
// before the route change nothing. So it refuses more spellings than an engine understands, and never fewer.
package policy

import (
	"fmt"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/kvshield/kvshield/proxy/reply"
)

// A Rule is one thing that is refused.
type Rule struct {
	Name string // for --allow
	Why  string // what it would do
	hits func(route) bool
}

// Cloud is the rule for what Ollama sends to another machine. Whoever starts Ollama has to turn its cloud models off, too, unless this is allowed.
const Cloud = "cloud"

// Rules in the order in which they are asked.
var Rules = []Rule{
	{"slot-save", "saving a slot writes a conversation's token ids to disk, in mode permute and off in clear", func(r route) bool { return r.slotAction("save") }},
	{"slot-restore", "restoring a slot puts somebody's saved conversation where the next request may go on from it", func(r route) bool { return r.slotAction("restore") }},
	{"slot-erase", "erasing a slot drops the cache of whoever uses it", func(r route) bool { return r.slotAction("erase") }},
	{"slots", "this is none of the slot actions that kvshield knows", func(r route) bool { return r.writes && r.has("slots") }},
	{"lora", "changing LoRA adapters changes the matrices that the shield was set up for", func(r route) bool { return r.writes && r.has("lora-adapters") }},
	{"props", "changing the engine's properties can change what it logs, stores and shows", func(r route) bool { return r.writes && r.ends("props") }},
	{"tools", "the engine's tools read files and run commands beside the unshielded part of the conversation", func(r route) bool { return r.writes && r.ends("tools") }},
	{Cloud, "Ollama's web search sends what a conversation asks for to Ollama's cloud", func(r route) bool { return r.writes && (r.has("web_search") || r.has("web_fetch")) }},
	{"cors-proxy", "it makes the engine's machine send requests wherever a client wants", func(r route) bool { return r.has("cors-proxy") }},
}

// Names that can be allowed.
func Names() []string {
	var names []string
	for _, r := range Rules {
		names = append(names, r.Name)
	}
	return names
}

// Policy is what to refuse.
type Policy struct{ allowed []string }

// New makes the policy that allows what is named.
func New(allow []string) (Policy, error) {
	for _, name := range allow {
		if !slices.Contains(Names(), name) {
			return Policy{}, fmt.Errorf("there is nothing named %q to allow; it takes %s", name, strings.Join(Names(), ", "))
		}
	}
	return Policy{allow}, nil
}

// Allows says whether a rule is allowed by name.
func (p Policy) Allows(name string) bool { return slices.Contains(p.allowed, name) }

// Check says why a request is refused, or nil.
func (p Policy) Check(r *http.Request) *reply.Failure {
	if o := overridden(r); o != "" {
		return &reply.Failure{Message: "the header " + o + " is refused: a request is judged by its own method and path; send it as what it is", Type: reply.BadRequest, Code: http.StatusBadRequest}
	}
	way := routeOf(r)
	for _, rule := range Rules {
		if !rule.hits(way) {
			continue
		}
		if p.Allows(rule.Name) {
			return nil
		}
		return &reply.Failure{
			Message: fmt.Sprintf("refused: %s; if you want this, start kvshield serve with --allow %s", rule.Why, rule.Name),
			Type:    reply.Permission,
			Code:    http.StatusForbidden,
		}
	}
	return nil
}

func overridden(r *http.Request) string {
	for _, h := range []string{"X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "X-Original-URL", "X-Rewrite-URL"} {
		if r.Header.Get(h) != "" {
			return h
		}
	}
	return ""
}

// route is a request as the rules see it.
type route struct {
	segments []string
	writes   bool
	actions  []string // of the query
	form     bool     // the body could carry parameters, too
}

func routeOf(r *http.Request) route {
	query, err := url.ParseQuery(r.URL.RawQuery)
	actions := query["action"]
	if err != nil {
		actions = append(actions, "unreadable")
	}
	for name := range query {
		if name != "action" && strings.EqualFold(strings.TrimSpace(name), "action") {
			actions = append(actions, "unreadable")
		}
	}
	t := strings.ToLower(r.Header.Get("Content-Type"))
	return route{
		segments: Segments(r.URL.EscapedPath()),
		writes:   r.Method != http.MethodGet && r.Method != http.MethodHead && r.Method != http.MethodOptions,
		actions:  actions,
		form:     strings.Contains(t, "form"),
	}
}

// Segments of an escaped path, loosely read.
func Segments(p string) []string {
	for range 8 {
		decoded, err := url.PathUnescape(p)
		if err != nil || decoded == p {
			break
		}
		p = decoded
	}
	p = strings.ReplaceAll(strings.ToLower(p), `\`, "/")
	p = strings.NewReplacer("?", "/", "#", "/", "\x00", "").Replace(p)
	var list []string
	for _, s := range strings.Split(path.Clean("/"+p), "/") {
		s, _, _ = strings.Cut(s, ";")
		if s = strings.TrimSpace(s); s != "" {
			list = append(list, s)
		}
	}
	return list
}

func (r route) has(segment string) bool { return slices.Contains(r.segments, segment) }

func (r route) ends(segment string) bool {
	return len(r.segments) > 0 && r.segments[len(r.segments)-1] == segment
}

// slotAction is true when this is the action and cannot be taken for another.
func (r route) slotAction(action string) bool {
	return r.writes && r.has("slots") && !r.form && len(r.actions) == 1 && r.actions[0] == action
}
