package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// modelTable is what docs/models.md says of every architecture. KVSHIELD_WRITE_MODELS=1 (make models) writes it there.
type modelTable struct {
	mu    sync.Mutex
	names []string
	ways  map[string]map[string]map[string]outcome // architecture, mode, way
	own   map[string]string                        // what the stock engine says where it does not run the tiny model
}

func newModelTable(names []string) *modelTable {
	return &modelTable{names: names, ways: map[string]map[string]map[string]outcome{}, own: map[string]string{}}
}

func (m *modelTable) add(name, mode, way string, o outcome) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ways[name] == nil {
		m.ways[name] = map[string]map[string]outcome{}
	}
	if m.ways[name][mode] == nil {
		m.ways[name][mode] = map[string]outcome{}
	}
	m.ways[name][mode][way] = o
}

func (m *modelTable) stock(name string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.own[name] = err.Error()
}

// verdict is one for all ways on the CPU: exact when each is, else the refusal.
func verdict(by map[string]outcome) string {
	worst, refused := 0.0, ""
	for _, way := range []string{"F32 cache", "flash on", "flash off"} {
		o := by[way]
		switch {
		case o.failed != "":
			return "**failed**: " + o.failed
		case o.refused != "":
			refused = o.refused
		}
		worst = max(worst, o.worst)
	}
	switch exact := by["F32 cache"].exact; {
	case refused != "" && exact:
		return "exact without flash attention; with it refused: " + shorten(refused)
	case refused != "":
		return "refused: " + shorten(refused)
	case exact:
		return fmt.Sprintf("exact (%.0e; %.0e with an F16 cache)", by["F32 cache"].worst, worst)
	}
	return "not run"
}

// also says how a model ran in another way than those of the verdict.
func also(by map[string]outcome, way string) string {
	switch o, ran := by[way]; {
	case !ran:
		return "–"
	case o.failed != "":
		return "**failed**: " + o.failed
	case o.refused != "":
		return "refused"
	default:
		return fmt.Sprintf("exact (%.0e)", o.worst)
	}
}

func shorten(s string) string {
	s, _, _ = strings.Cut(s, "; use ")
	s, _, _ = strings.Cut(s, "; run it in")
	return strings.ReplaceAll(s, "|", "/")
}

// rows are lines of the table and of the list below it, by architecture.
type rows struct{ ran, not map[string]string }

func (m *modelTable) rows() rows {
	r := rows{map[string]string{}, map[string]string{}}
	for _, name := range m.names {
		by := m.ways[name]
		if by == nil {
			if why, tried := m.own[name]; tried {
				r.not[name] = fmt.Sprintf("- `%s`: %s\n", name, plainly(why))
			}
			continue
		}
		var b strings.Builder
		fmt.Fprintf(&b, "| `%s` |", name)
		for _, mode := range []string{"resident", "permute"} {
			fmt.Fprintf(&b, " %s | %s | %s |", verdict(by[mode]), also(by[mode], "Vulkan"), also(by[mode], "shift"))
		}
		r.ran[name] = b.String() + "\n"
	}
	return r
}

// columns of the table with a mode's verdict.
var columns = []struct {
	at   int
	mode string
}{{1, "resident"}, {4, "permute"}}

var lineOf = regexp.MustCompile("(?m)^(\\| |- )`([^`]+)`.*\n")

// keep takes lines back out of a text that was written before, for architectures that were not run this time.
func (r rows) keep(text string) {
	for _, m := range lineOf.FindAllStringSubmatch(text, -1) {
		name, line := m[2], m[0]
		if r.ran[name] != "" || r.not[name] != "" {
			continue
		}
		if m[1] == "- " {
			r.not[name] = line
		} else {
			r.ran[name] = line
		}
	}
}

// count says how many architectures have a verdict that begins so, in a column of the table.
func (r rows) count(column int, verdict string) (n int) {
	for _, line := range r.ran {
		if cells := strings.Split(line, " | "); len(cells) > column && strings.HasPrefix(strings.TrimSpace(cells[column]), verdict) {
			n++
		}
	}
	return n
}

func (r rows) text(names []string) string {
	var b strings.Builder
	b.WriteString("| architecture | `resident`, CPU | Vulkan | context shift | `permute`, CPU | Vulkan | context shift |\n|---|---|---|---|---|---|---|\n")
	for _, name := range names {
		b.WriteString(r.ran[name])
	}
	for _, c := range columns {
		fmt.Fprintf(&b, "\nMode `%s`: %d exact, %d refused, of %d architectures that the engine knows and shapes of them.\n",
			c.mode, r.count(c.at, "exact"), r.count(c.at, "refused"), len(names))
	}
	b.WriteString("\nNot run, because no tiny model could be made or the stock engine does not generate text with it:\n\n")
	for _, name := range names {
		b.WriteString(r.not[name])
	}
	return b.String()
}

// plainly takes paths and times out of what the engine said.
func plainly(s string) string {
	s = strings.TrimPrefix(s, "no tiny model of ")
	if i := strings.Index(s, ": 0.0"); i >= 0 {
		s = s[:i]
	}
	if _, message, ok := strings.Cut(s, `"message":"`); ok {
		s, _, _ = strings.Cut(message, `"`)
	}
	return strings.ReplaceAll(s, "./src/", "")
}

const (
	tableBegin = "<!-- written by `make models` -->\n"
	tableEnd   = "<!-- end -->\n"
)

// finish writes the table. Architectures that were not run keep their lines.
func (m *modelTable) finish(t *testing.T, all []string) {
	r := m.rows()
	for _, c := range columns {
		t.Logf("mode %s: %d exact, %d refused, of %d", c.mode, r.count(c.at, "exact"), r.count(c.at, "refused"), len(m.names))
	}
	if os.Getenv("KVSHIELD_WRITE_MODELS") == "" {
		return
	}
	path := filepath.Join(root, "docs", "models.md")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(text), tableBegin)
	old, tail, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		t.Fatalf("%s has no marks for the table", path)
	}
	r.keep(old)
	if err := os.WriteFile(path, []byte(head+tableBegin+r.text(all)+tableEnd+tail), 0o644); err != nil {
		t.Fatal(err)
	}
}
