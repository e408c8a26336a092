package report

import (
	"strings"

	"github.com/charmbracelet/x/ansi"
)

// text writes the start of a recovered text below the true one, each token below its own.
func (t *terminal) text(all []pair) {
	const room = width - labelWidth
	var line []pair
	used, total := 0, 0
	for _, p := range all {
		p = trim(p)
		w := columns(p)
		if total+w > textWidth {
			line = append(line, pair{Truth: "…", Found: "…", Right: true})
			break
		}
		if used+w >= room { // one column stays free for the … of the end
			t.lines(line)
			line, used = nil, 0
		}
		line = append(line, p)
		used, total = used+w, total+w
	}
	t.lines(line)
}

// trim keeps a token from filling the line, and gives one that was not found a shape.
func trim(p pair) pair {
	p.Truth = ansi.Truncate(p.Truth, tokenWidth, "…")
	p.Found = ansi.Truncate(p.Found, tokenWidth, "…")
	if p.Found == "" {
		p.Found = "·"
	}
	return p
}

func columns(p pair) int { return max(ansi.StringWidth(p.Truth), ansi.StringWidth(p.Found)) }

// lines writes one line of truth, the same line as it was found, and without colour the marks below.
func (t *terminal) lines(line []pair) {
	if len(line) == 0 {
		return
	}
	var truth, found, marks strings.Builder
	for _, p := range line {
		style, mark := t.miss, "x"
		if p.Right {
			style, mark = t.hit, "="
		}
		w := columns(p)
		truth.WriteString(pad(p.Truth, w))
		found.WriteString(style.Render(p.Found) + strings.Repeat(" ", w-ansi.StringWidth(p.Found)))
		marks.WriteString(pad(strings.Repeat(mark, ansi.StringWidth(p.Found)), w))
	}
	t.line("truth", truth.String())
	t.line("found", found.String())
	if !t.color {
		t.line("", marks.String())
	}
}

func (t *terminal) line(label, s string) {
	t.WriteString(t.faint.Render(pad(label, labelWidth)) + strings.TrimRight(s, " ") + "\n")
}
