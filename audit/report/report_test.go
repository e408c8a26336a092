package report

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/charmbracelet/x/ansi"

	"github.com/kvshield/kvshield/audit"
)

// sample is a report of the size that a real audit has. hostile is put into every text.
func sample(tokens int, hostile string) *audit.Report {
	r := &audit.Report{Schema: audit.Schema, Created: time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC), Engine: "llama-server" + hostile, CacheType: "f16",
		Model: audit.Model{Name: "sample" + hostile, Architecture: "llama", Layers: 16, HeadsKV: 8, HeadDim: 64, Vocabulary: 128256}, Conversation: "built-in"}
	for i, mode := range []string{"off", "permute"} {
		run := audit.Run{Mode: mode, Tokens: tokens, Chance: 0.042, Clear: []string{"the slot file carries token ids" + hostile}, Notes: []string{"a note" + hostile}}
		for t := range tokens {
			run.Truth = append(run.Truth, fmt.Sprintf(" wörd%d%s", t, hostile))
		}
		for a := range 12 {
			res := audit.Result{Attack: fmt.Sprintf("attack-%d", a), Title: fmt.Sprintf("attack number %d%s", a, hostile), Attacker: fmt.Sprintf("A%d", 1+a/3), Source: audit.SlotFile,
				Tokens: tokens, Rate: []float64{1, 0.001 * float64(a)}[i], Random: new(float64), Other: new(float64), Where: "values of layer 0" + hostile}
			for t := range tokens {
				res.Guess = append(res.Guess, audit.Piece{Text: run.Truth[t], Right: i == 0})
			}
			run.Results = append(run.Results, res)
			run.Curves = append(run.Curves, audit.Line{Attack: res.Attack, Title: res.Title, Points: []audit.Point{{Tokens: 16, Rate: 0.5}, {Tokens: max(tokens, 17), Rate: res.Rate}}})
		}
		run.Results = append(run.Results, audit.Result{Attack: "left-out", Title: "an attack left out", Attacker: "A3", Source: audit.SlotFile, Skipped: "no weights could be read" + hostile})
		r.Runs = append(r.Runs, run)
	}
	return r
}

// show returns both forms of a report.
func show(t *testing.T, r *audit.Report) (table, page string) {
	t.Helper()
	var a, b bytes.Buffer
	if err := WriteTable(&a, r, false); err != nil {
		t.Fatal(err)
	}
	if err := WriteHTML(&b, r); err != nil {
		t.Fatal(err)
	}
	return a.String(), b.String()
}

func TestBothFormsSayWhatWasFound(t *testing.T) {
	table, page := show(t, sample(40, ""))
	for _, want := range []string{"sample", "attack number 11", "100 %", "4.2", "no weights could be read", "the slot file carries token ids", "a note", "wörd3", "values of layer 0"} {
		if !strings.Contains(table, want) {
			t.Errorf("the table lacks %q", want)
		}
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if strings.Contains(table, "\x1b") {
		t.Error("an escape sequence without colour")
	}
	if !strings.Contains(page, `class="hit"`) || !strings.Contains(page, `class="miss"`) || !strings.Contains(page, "<polyline") {
		t.Error("the page lacks highlights or plot")
	}
	if regexp.MustCompile(`(?i)<script|https?://|@import|url\(`).MatchString(page) {
		t.Error("the page needs something beside itself")
	}
}

func TestTableFits(t *testing.T) {
	table, _ := show(t, sample(300, "漢字漢字漢字"))
	for line := range strings.Lines(table) {
		if w := ansi.StringWidth(strings.TrimRight(line, "\n")); w > 100 {
			t.Errorf("%d columns: %q", w, line)
		}
	}
}

func TestForeignTextIsHarmless(t *testing.T) {
	const hostile = "\x1b[2J\x07\u202e<script>alert(1)</script>\x00\r\n"
	table, page := show(t, sample(20, hostile))
	for name, text := range map[string]string{"table": table, "page": page} {
		if i := strings.IndexFunc(text, func(r rune) bool { return r < ' ' && r != '\n' || r == '\u202e' }); i >= 0 {
			t.Errorf("the %s holds %q", name, text[i:min(i+8, len(text))])
		}
	}
	if strings.Contains(page, "<script") {
		t.Error("a script got into the page")
	}
}

func TestUnusualReports(t *testing.T) {
	short := sample(5, "")
	short.Runs[0].Results[0].Guess = nil
	short.Runs[0].Results[1].Known = 99
	short.Runs[1].Truth = nil
	for name, r := range map[string]*audit.Report{"empty": {}, "a run without results": {Runs: []audit.Run{{Mode: "off"}}}, "lengths that differ": short} {
		if table, page := show(t, r); table == "" || page == "" {
			t.Errorf("%s: nothing is shown", name)
		}
	}
	if WriteTable(&bytes.Buffer{}, nil, false) == nil || WriteHTML(&bytes.Buffer{}, nil) == nil {
		t.Error("no report at all is no error")
	}
}

// A real browser draws the page and asks for nothing else. Without a browser there is nothing to look with.
func TestPageInABrowser(t *testing.T) {
	browser, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("no chromium on this machine: the page was not looked at")
	}
	dir := t.TempDir()
	_, page := show(t, sample(1000, ""))
	file := filepath.Join(dir, "page.html")
	if err := os.WriteFile(file, []byte(page), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var log bytes.Buffer
	cmd := exec.CommandContext(ctx, browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--user-data-dir="+dir,
		"--window-size=400,900", "--screenshot="+filepath.Join(dir, "page.png"), "file://"+file)
	cmd.Stderr = &log
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &log)
	}
	if st, err := os.Stat(filepath.Join(dir, "page.png")); err != nil || st.Size() < 10_000 {
		t.Errorf("no picture of the page: %v", err)
	}
	if i := strings.Index(log.String(), "CONSOLE"); i >= 0 {
		t.Errorf("the page complains: %s", log.String()[i:])
	}
}
