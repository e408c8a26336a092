package service

import (
	"bufio"
	"io"
	"strings"
)

// setting is one assignment in a unit file.
type setting struct{ section, name, value string }

// parse reads a unit file as systemd does: comments, sections, lines that go on behind a backslash. It takes lines of any
// length, as a PATH in them can be longer than the published parsers take. What is malformed is left out: systemd says so.
func parse(r io.Reader) ([]setting, error) {
	var list []setting
	var section, line string
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, unitMax)
	for lines.Scan() {
		text := strings.TrimSpace(lines.Text())
		if strings.HasPrefix(text, "#") || strings.HasPrefix(text, ";") {
			continue // inside a line that goes on, too
		}
		if rest, more := strings.CutSuffix(text, `\`); more {
			line += rest + " "
			continue
		}
		text, line = line+text, ""
		if name, ok := strings.CutPrefix(text, "["); ok && strings.HasSuffix(name, "]") {
			section = strings.TrimSuffix(name, "]")
		} else if name, value, ok := strings.Cut(text, "="); ok {
			list = append(list, setting{section, strings.TrimSpace(name), strings.TrimSpace(value)})
		}
	}
	return list, lines.Err()
}

// values of a name in section [Service], in their order. An empty one takes back those before it.
func values(settings []setting, name string) []string {
	var list []string
	for _, s := range settings {
		switch {
		case s.section != "Service" || s.name != name:
		case s.value == "":
			list = nil
		default:
			list = append(list, s.value)
		}
	}
	return list
}

// last value of a name in section [Service].
func last(settings []setting, name string) string {
	if list := values(settings, name); len(list) > 0 {
		return list[len(list)-1]
	}
	return ""
}

// prefixes are what may stand before a command's program in ExecStart=, and the one that changes what the words mean.
const (
	prefixes   = "-:+!|@"
	ownArgZero = "@"
)

// splitCommand divides the value of an ExecStart= into its prefixes, its program, and all of it but the prefixes.
func splitCommand(value string) (prefix, program, command string) {
	command = strings.TrimLeft(value, prefixes)
	prefix = value[:len(value)-len(command)]
	program, _, _ = strings.Cut(command, " ")
	if command != "" && strings.ContainsAny(command[:1], `"'`) {
		program, _, _ = strings.Cut(command[1:], command[:1])
	}
	return prefix, strings.ReplaceAll(program, "%%", "%"), command
}

// quote writes a word so that systemd reads it as it is.
func quote(word string) string {
	word = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%", "$", "$$").Replace(word)
	if word == "" || strings.ContainsAny(word, " \t\\\"';") {
		return `"` + word + `"`
	}
	return word
}
