package e2e

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
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
	if o, ran := by[embeddingWay]; ran && o.exact {
		return fmt.Sprintf("exact (%.0e): embeddings, it makes no text and keeps no cache", o.worst)
	} else if ran {
		return o.text()
	}
	worst, refused := 0.0, ""
	for _, way := range []string{"F32 cache", "flash on", "flash off"} {
		o := by[way]
		switch {
		case o.failed != "" || o.unknown != "":
			return o.text()
		case o.refused != "":
			refused = o.refused
		}
		worst = max(worst, o.worst)
	}
	switch exact := by["F32 cache"].exact; {
	case refused != "" && exact:
		return "exact without flash attention; with it refused: " + shorten(refused)
	case refused != "":
		return outcome{refused: refused}.text()
	case exact:
		return fmt.Sprintf("exact (%.0e; %.0e with an F16 cache)", by["F32 cache"].worst, worst)
	}
	return "not run"
}

// text says in the table what an outcome is that is not exact.
func (o outcome) text() string {
	switch {
	case o.failed != "":
		return "**failed**: " + o.failed
	case o.unknown != "":
		return "unknown"
	}
	return "refused: " + shorten(o.refused)
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
	case o.worst > muchOff:
		return fmt.Sprintf("runs (%.0e)", o.worst)
	default:
		return fmt.Sprintf("exact (%.0e)", o.worst)
	}
}

func shorten(s string) string {
	s, _, _ = strings.Cut(s, "; use ")
	s, _, _ = strings.Cut(s, "; run it in")
	return strings.ReplaceAll(s, "|", "/")
}

// rows are lines of the table, and of the list below it of what the stock engine does not run, by architecture.
type rows struct{ table, list map[string]string }

func (m *modelTable) rows() rows {
	r := rows{map[string]string{}, map[string]string{}}
	for _, name := range m.names {
		by := m.ways[name]
		if by == nil {
			continue
		}
		var b strings.Builder
		fmt.Fprintf(&b, "| `%s` |", name)
		for _, mode := range []string{"resident", "permute"} {
			fmt.Fprintf(&b, " %s | %s | %s |", verdict(by[mode]), also(by[mode], "Vulkan"), also(by[mode], "shift"))
		}
		r.table[name] = b.String() + "\n"
		if why := m.own[name]; why != "" {
			r.list[name] = fmt.Sprintf("- `%s`: %s\n", name, plainly(name, why))
		}
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
	ran := maps.Clone(r.table)
	for _, m := range lineOf.FindAllStringSubmatch(text, -1) {
		name, line := m[2], m[0]
		switch {
		case ran[name] != "":
		case m[1] == "- ":
			r.list[name] = line
		default:
			r.table[name] = line
		}
	}
}

// count says how many architectures have a verdict that begins so, in a column of the table.
func (r rows) count(column int, verdict string) (n int) {
	for _, line := range r.table {
		if word(line, column) == verdict {
			n++
		}
	}
	return n
}

func (r rows) text(names []string) string {
	var b strings.Builder
	b.WriteString("| architecture | `resident`, CPU | Vulkan | context shift | `permute`, CPU | Vulkan | context shift |\n|---|---|---|---|---|---|---|\n")
	for _, name := range names {
		b.WriteString(r.table[name])
	}
	for _, c := range columns {
		fmt.Fprintf(&b, "\nMode `%s`: %d exact, %d refused, %d unknown, of %d architectures that the engine knows and shapes of them.\n",
			c.mode, r.count(c.at, "exact"), r.count(c.at, "refused"), r.count(c.at, "unknown"), len(names))
	}
	b.WriteString("\nThe stock engine does not run these tiny models. What a mode says of them, it says before there is a token; a shielded engine did not run them either:\n\n")
	for _, name := range names {
		b.WriteString(r.list[name])
	}
	return b.String()
}

// plainly takes paths and times out of what the engine said.
func plainly(name, s string) string {
	s = strings.TrimPrefix(s, "no tiny model of "+name+": ")
	if i := strings.Index(s, ": 0.0"); i >= 0 {
		s = s[:i]
	}
	if _, message, ok := strings.Cut(s, `"message":"`); ok {
		s, _, _ = strings.Cut(message, `"`)
	}
	return strings.ReplaceAll(s, "./src/", "")
}

var modelsPage = filepath.Join(root, "docs", "models.md")

// documented are the lines of the page.
func documented(t *testing.T) rows {
	t.Helper()
	page, err := os.ReadFile(modelsPage)
	if err != nil {
		t.Fatal(err)
	}
	r := rows{map[string]string{}, map[string]string{}}
	r.keep(string(page))
	return r
}

// says is what a line says of an architecture in a mode: exact, say.
func (r rows) says(name, mode string) string {
	for _, c := range columns {
		if c.mode == mode {
			return word(r.table[name], c.at)
		}
	}
	return ""
}

// check fails the test where an architecture is not any more what the page says of it.
func (r rows) check(t *testing.T) {
	page := documented(t)
	for name := range r.table {
		for _, c := range columns {
			if is, was := r.says(name, c.mode), page.says(name, c.mode); is != was {
				t.Errorf("%s, mode %s: %s; docs/models.md says %q", name, c.mode, is, was)
			}
		}
	}
}

// word is the first one of a column of a line.
func word(line string, column int) string {
	cells := strings.Split(line, " | ")
	if len(cells) <= column {
		return ""
	}
	first, _, _ := strings.Cut(strings.TrimSpace(cells[column]), " ")
	return strings.TrimSuffix(first, ":")
}

// rewrite replaces what docs/models.md has between a mark and the next end, when it is to be written.
func rewrite(t *testing.T, mark string, text func(old string) string) {
	t.Helper()
	if os.Getenv("KVSHIELD_WRITE_MODELS") == "" {
		return
	}
	page, err := os.ReadFile(modelsPage)
	if err != nil {
		t.Fatal(err)
	}
	const end = "<!-- end -->\n"
	head, rest, ok := strings.Cut(string(page), mark)
	old, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no %q", modelsPage, mark)
	}
	if err := os.WriteFile(modelsPage, []byte(head+mark+text(old)+end+tail), 0o644); err != nil {
		t.Fatal(err)
	}
}

// finish writes the table, or else compares it with what was written. Architectures that were not run keep their lines.
func (m *modelTable) finish(t *testing.T, all []string) {
	r := m.rows()
	for _, c := range columns {
		t.Logf("mode %s: %d exact, %d refused, %d unknown, of %d", c.mode, r.count(c.at, "exact"), r.count(c.at, "refused"), r.count(c.at, "unknown"), len(m.names))
	}
	if os.Getenv("KVSHIELD_WRITE_MODELS") == "" {
		r.check(t)
		return
	}
	rewrite(t, "<!-- written by `make models` -->\n", func(old string) string {
		r.keep(old)
		return r.text(all)
	})
}

// together is one outcome for all ways: the first that is not exact.
func together(by map[string]outcome) (o outcome, ran bool) {
	for _, way := range slices.Sorted(maps.Keys(by)) {
		if o = by[way]; !o.exact {
			break
		}
	}
	return o, len(by) > 0
}

// summary writes a section with what was exact and what was refused.
func (m *modelTable) summary(t *testing.T, section string) {
	rewrite(t, "<!-- "+section+", written by `make models` -->\n", func(string) string {
		var b strings.Builder
		fmt.Fprintf(&b, "Of %d architectures that were tried the stock engine runs %d.\n", len(m.names), len(m.ways))
		for _, mode := range []string{"resident", "permute"} {
			var exact, rest []string
			for _, name := range m.names {
				switch o, ran := together(m.ways[name][mode]); {
				case o.exact:
					exact = append(exact, "`"+name+"`")
				case ran:
					what, _, _ := strings.Cut(o.text(), ":")
					rest = append(rest, fmt.Sprintf("`%s` %s", name, what))
				}
			}
			fmt.Fprintf(&b, "\nMode `%s`: %d exact: %s. The rest: %s.\n", mode, len(exact), strings.Join(exact, ", "), cmp.Or(strings.Join(rest, ", "), "none"))
		}
		return b.String()
	})
}
