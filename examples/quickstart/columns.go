package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
)

const width = 46 // of one column, in characters

// compare asks both servers every question and says whether all answers were equal.
func compare(w io.Writer, stock, shielded server, list []question) (bool, error) {
	healthy, cancel := context.WithTimeout(context.Background(), healthyIn)
	defer cancel()
	for _, s := range []server{stock, shielded} {
		if err := s.awaitHealth(healthy); err != nil {
			return false, err
		}
	}
	equal := 0
	for _, q := range list {
		fmt.Fprintf(w, "\n%s: %q\n", q.api, q.text)
		same, err := sideBySide(w, [2]server{shielded, stock}, q)
		if err != nil {
			return false, err
		}
		if same {
			equal++
		}
	}
	fmt.Fprintf(w, "\n%d of %d answers equal, byte for byte\n", equal, len(list))
	return equal == len(list), nil
}

// part of an answer, or its end.
type part struct {
	side int
	text string
	end  bool
	err  error
}

// sideBySide shows both answers and says whether they are equal.
func sideBySide(w io.Writer, servers [2]server, q question) (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), answerIn)
	defer cancel()
	parts := make(chan part)
	send := func(p part) {
		select {
		case parts <- p:
		case <-ctx.Done():
		}
	}
	for i, s := range servers {
		go func() {
			err := s.ask(ctx, q, func(text string) { send(part{side: i, text: text}) })
			send(part{side: i, end: true, err: err})
		}()
	}
	t := table{w: w}
	t.row("shielded", "stock")
	for open := len(servers); open > 0; {
		select {
		case <-ctx.Done():
			return false, fmt.Errorf("no answer within %v", answerIn)
		case p := <-parts:
			if p.err != nil {
				return false, p.err
			}
			if p.end {
				open--
			}
			t.add(p)
		}
	}
	return t.verdict()
}

// table prints a row as soon as both columns have it.
type table struct {
	w       io.Writer
	columns [2]column
	printed int
}

func (t *table) row(left, right string) { fmt.Fprintf(t.w, "  %-*s | %s\n", width, left, right) }

func (t *table) add(p part) {
	t.columns[p.side].add(p.text)
	if p.end {
		t.columns[p.side].end()
	}
	for ; t.columns[0].has(t.printed) && t.columns[1].has(t.printed) && !t.done(); t.printed++ {
		t.row(t.columns[0].line(t.printed), t.columns[1].line(t.printed))
	}
}

func (t *table) done() bool {
	return t.printed >= max(len(t.columns[0].lines), len(t.columns[1].lines))
}

// verdict compares. Two empty answers are equal and show nothing.
func (t *table) verdict() (bool, error) {
	shielded, stock := t.columns[0].text, t.columns[1].text
	if shielded == "" && stock == "" {
		return false, errors.New("both answers are empty; there is nothing to compare")
	}
	word := "DIFFERENT"
	if shielded == stock {
		word = "equal"
	}
	fmt.Fprintf(t.w, "  => %s (%d bytes and %d bytes)\n", word, len(shielded), len(stock))
	return shielded == stock, nil
}

// column breaks text into lines as it arrives.
type column struct {
	text  string // all of it, as it came
	lines []string
	open  []rune // the line that may still grow
	ended bool
}

func (c *column) has(i int) bool { return i < len(c.lines) || c.ended }

func (c *column) line(i int) string {
	if i < len(c.lines) {
		return c.lines[i]
	}
	return ""
}

func (c *column) add(text string) {
	c.text += text
	for _, r := range text {
		switch {
		case r == '\n':
			c.close(len(c.open))
		case unicode.IsControl(r):
			c.open = append(c.open, ' ') // an answer must not steer the terminal
		default:
			c.open = append(c.open, r)
		}
		if len(c.open) > width {
			c.close(c.breakAt())
		}
	}
}

// breakAt is behind the last space of the open line, or its width where there is none.
func (c *column) breakAt() int {
	if at := strings.LastIndexByte(string(c.open), ' '); at > 0 {
		return len([]rune(string(c.open)[:at])) + 1
	}
	return width
}

func (c *column) close(at int) {
	c.lines = append(c.lines, strings.TrimRight(string(c.open[:at]), " "))
	c.open = append([]rune(nil), c.open[at:]...)
}

func (c *column) end() {
	if len(c.open) > 0 {
		c.close(len(c.open))
	}
	c.ended = true
}
