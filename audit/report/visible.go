package report

import (
	"fmt"
	"reflect"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/kvshield/kvshield/audit"
)

// lineFeed stands for the end of a line in shown text.
const lineFeed = '⏎'

// maxMarks is how many combining marks may stand on one letter. Without a limit a text can cover the lines around it.
const maxMarks = 2

// visible makes text safe to show: what is left can neither steer a terminal nor reorder or hide what stands beside it.
// Control characters become their pictures (Unicode block 2400), all else that has no shape of its own, such as the
// overrides of the bidirectional algorithm, its number: ‹U+202E›.
func visible(s string) string {
	var b strings.Builder
	marks := maxMarks // none at the start: it would stand on whatever was printed before
	for _, r := range s {
		if unicode.Is(unicode.M, r) {
			if marks == maxMarks {
				continue
			}
			marks++
		} else {
			marks = 0
		}
		writeVisible(&b, r)
	}
	return b.String()
}

func writeVisible(b *strings.Builder, r rune) {
	switch {
	case r == '\n':
		b.WriteRune(lineFeed)
	case r == '\t':
		b.WriteRune('⇥')
	case r < ' ':
		b.WriteRune('␀' + r)
	case r == 0x7f:
		b.WriteRune('␡')
	case r == utf8.RuneError || unicode.IsGraphic(r):
		b.WriteRune(r)
	default:
		fmt.Fprintf(b, "‹%U›", r)
	}
}

// shown is a copy of a report in which every text went through [visible]: names out of a model's file and texts out of a
// cache are equally foreign. It goes by reflection, so that a field added to the report is not forgotten here.
func shown(r *audit.Report) *audit.Report {
	return copyShown(reflect.ValueOf(r)).Interface().(*audit.Report)
}

func copyShown(v reflect.Value) reflect.Value {
	c := reflect.New(v.Type()).Elem()
	switch v.Kind() {
	case reflect.String:
		c.SetString(visible(v.String()))
	case reflect.Pointer:
		if !v.IsNil() {
			c.Set(reflect.New(v.Type().Elem()))
			c.Elem().Set(copyShown(v.Elem()))
		}
	case reflect.Slice:
		for i := range v.Len() {
			c = reflect.Append(c, copyShown(v.Index(i)))
		}
	case reflect.Map:
		c.Set(reflect.MakeMapWithSize(v.Type(), v.Len()))
		for k, e := range v.Seq2() {
			c.SetMapIndex(copyShown(k), copyShown(e))
		}
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return v
		}
		for i := range v.NumField() {
			c.Field(i).Set(copyShown(v.Field(i)))
		}
	default:
		c.Set(v)
	}
	return c
}
