package report

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	"charm.land/lipgloss/v2"
	"charm.land/lipgloss/v2/table"
	"github.com/charmbracelet/x/ansi"

	"github.com/kvshield/kvshield/audit"
)

// All in columns of a terminal; a wide character takes two.
const (
	width      = 100
	labelWidth = 8   // of "truth", "found", …
	modeWidth  = 21  // of a column of the table
	perTable   = 3   // modes side by side
	textWidth  = 400 // of the recovered text that is shown
	tokenWidth = 24  // of one token in it
)

// style of the colours: the terminal's own sixteen, so that they fit its background.
type style struct{ bold, faint, leak, hit, miss lipgloss.Style }

func newStyle(color bool) style {
	plain := lipgloss.NewStyle()
	if !color {
		return style{plain, plain, plain, plain, plain}
	}
	return style{
		bold:  plain.Bold(true),
		faint: plain.Faint(true),
		leak:  plain.Bold(true).Foreground(lipgloss.Red),
		hit:   plain.Foreground(lipgloss.Green).Underline(true).UnderlineSpaces(true),
		miss:  plain.Foreground(lipgloss.Red),
	}
}

// WriteTable writes r for a terminal of 100 columns. With color it holds ANSI colours, without it no escape sequence at
// all; control characters in the report's texts are shown, never passed on.
func WriteTable(w io.Writer, r *audit.Report, color bool) error {
	if r == nil {
		return errNone
	}
	t := terminal{color: color, style: newStyle(color)}
	t.report(shown(r))
	if _, err := io.WriteString(w, t.String()); err != nil {
		return fmt.Errorf("the audit's report could not be written: %w", err)
	}
	return nil
}

type terminal struct {
	strings.Builder
	style
	color bool
}

func (t *terminal) report(r *audit.Report) {
	t.item("model", model(r.Model))
	t.item("engine", fmt.Sprintf("%s, cache of %s", cmp.Or(r.Engine, "unknown"), cmp.Or(r.CacheType, "unknown type")))
	t.item("talk", conversation(r))
	if len(r.Runs) == 0 {
		t.prose("", "No mode was audited.")
		return
	}
	reasons := t.tables(r)
	t.prose("", "In % of tokens; "+marked+" marks what chance does not explain. Below each figure what chance gives: the most frequent token · "+
		"the same attack on random numbers · on the cache of another conversation.")
	for i, reason := range reasons {
		t.prose(fmt.Sprintf("[%d]", i+1), reason)
	}
	for i := range r.Runs {
		t.run(&r.Runs[i])
	}
	t.legend()
}

// conversation, its length and the day.
func conversation(r *audit.Report) string {
	s := cmp.Or(r.Conversation, "unknown")
	for i := range r.Runs {
		s += fmt.Sprintf(", %s tokens in mode %s", count(r.Runs[i].Tokens), r.Runs[i].Mode)
	}
	if r.Created.IsZero() {
		return s
	}
	return s + ", " + r.Created.UTC().Format("2006-01-02 15:04 UTC")
}

const (
	marked   = "▲"
	unmarked = " "
)

// tables writes the table attack × mode, a few modes at a time, and returns the reasons its footnotes point to.
func (t *terminal) tables(r *audit.Report) (reasons []string) {
	rows := rowsOf(r)
	for from := 0; from < len(r.Runs); from += perTable {
		to := min(from+perTable, len(r.Runs))
		header := []string{"", "attack"}
		for _, run := range r.Runs[from:to] {
			header = append(header, "  "+ansi.Truncate(cmp.Or(run.Mode, "unnamed"), modeWidth-4, "…"))
		}
		body := make([][]string, len(rows))
		for i, row := range rows {
			body[i] = []string{ansi.Truncate(row.Attacker, 4, "…"), t.title(row, to-from)}
			for _, c := range row.Cells[from:to] {
				body[i] = append(body[i], t.cell(c, &reasons))
			}
		}
		t.WriteString("\n" + t.table(header, body) + "\n\n")
	}
	return reasons
}

func (t *terminal) table(header []string, body [][]string) string {
	return table.New().Headers(header...).Rows(body...).Wrap(true).
		Border(lipgloss.NormalBorder()).BorderTop(false).BorderBottom(false).BorderLeft(false).BorderRight(false).BorderColumn(false).
		StyleFunc(func(row, _ int) lipgloss.Style {
			s := lipgloss.NewStyle().PaddingRight(1)
			if row == table.HeaderRow && t.color {
				s = s.Bold(true)
			}
			return s
		}).String()
}

// title of a row, wrapped to what n modes leave of the width.
func (t *terminal) title(r row, n int) string {
	columns := width - 6 - n*modeWidth
	title := ansi.Wrap(ansi.Truncate(r.Title, 2*columns, "…"), columns, "")
	if r.Known > 0 {
		title += "\n" + t.faint.Render(fmt.Sprintf("%s tokens known", count(r.Known)))
	}
	return title
}

// cell is a figure and below it what chance gives.
func (t *terminal) cell(c cell, reasons *[]string) string {
	if c.Best == nil {
		return t.skipped(c.Skipped, reasons)
	}
	mark, style := unmarked, t.bold
	if leaks(c.Run, c.Best) {
		mark, style = marked, t.leak
	}
	chance := strings.Join(controls(c.Run, c.Best), " · ")
	if figuresOnly(c.Best) {
		chance = fmt.Sprintf("auc of chance %.1f", aucChance)
	}
	cut := func(s string) string { return ansi.Truncate(s, modeWidth-4, "…") }
	return mark + " " + style.Render(cut(figure(c.Best))) + "\n  " + t.faint.Render(cut(chance))
}

func (t *terminal) skipped(why []string, reasons *[]string) string {
	s := "  -"
	for _, reason := range why {
		i := slices.Index(*reasons, reason)
		if i < 0 {
			i = len(*reasons)
			*reasons = append(*reasons, reason)
		}
		s += fmt.Sprintf(" [%d]", i+1)
	}
	return ansi.Truncate(s, modeWidth-2, "…")
}

// run writes the worst leak of one mode, and what else lay open.
func (t *terminal) run(run *audit.Run) {
	name := ansi.Truncate(cmp.Or(run.Mode, "unnamed"), 40, "…")
	if run.TEE != "" {
		name += ansi.Truncate(" (TEE: "+run.TEE, 50, "…") + ")"
	}
	t.WriteString("\n" + t.bold.Render(name) + " " + t.faint.Render(strings.Repeat("─", width-1-ansi.StringWidth(name))) + "\n")
	if res := worst(run); res != nil {
		t.item("worst", headline(run, res))
		t.item("where", cmp.Or(res.Where, "not said"))
		t.text(pairs(run, res))
	} else {
		t.item("worst", "no attack was run")
	}
	for _, clear := range run.Clear {
		t.item("clear", clear)
	}
	for _, note := range run.Notes {
		t.item("note", note)
	}
}

// headline says in one sentence what the worst leak is.
func headline(run *audit.Run, res *audit.Result) string {
	s := fmt.Sprintf("%s (%s) on the %s recovers %s of %s tokens; chance gives %s", cmp.Or(res.Title, res.Attack), res.Attacker, res.Source,
		percent(res.Rate), count(res.Tokens), percent(baseline(run, res)))
	if !leaks(run, res) {
		s += ": no more than chance explains"
	}
	return s
}

func (t *terminal) legend() {
	if t.color {
		t.prose("", "\nfound: "+t.hit.Render("right")+" is green and underlined, "+t.miss.Render("wrong")+" red; · is a token not found.")
		return
	}
	t.prose("", "\nfound: = stands below what is right, x below what is wrong; · is a token not found.")
}

// item writes a label and what it labels, further lines indented alike.
func (t *terminal) item(label, text string) {
	lines := strings.Split(ansi.Wrap(text, width-labelWidth, ""), "\n")
	for i, line := range lines {
		if i > 0 {
			label = ""
		}
		t.WriteString(t.faint.Render(pad(label, labelWidth)) + line + "\n")
	}
}

// prose is an item whose label takes only its own room.
func (t *terminal) prose(label, text string) {
	if label != "" {
		text = label + " " + text
	}
	t.WriteString(ansi.Wrap(text, width, "") + "\n")
}

// pad fills s up with spaces.
func pad(s string, columns int) string {
	return s + strings.Repeat(" ", max(columns-ansi.StringWidth(s), 0))
}
