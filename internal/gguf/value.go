package gguf

import (
	"encoding/binary"
	"fmt"
)

// kind is the type of a key's value, with the format's numbers.
type kind uint32

const (
	kindU8 kind = iota
	kindI8
	kindU16
	kindI16
	kindU32
	kindI32
	kindF32
	kindBool
	kindString
	kindArray
	kindU64
	kindI64
	kindF64
)

var kinds = [...]struct {
	name string
	size uint64 // bytes, 0 when they differ from value to value
}{
	kindU8: {"u8", 1}, kindI8: {"i8", 1}, kindU16: {"u16", 2}, kindI16: {"i16", 2},
	kindU32: {"u32", 4}, kindI32: {"i32", 4}, kindF32: {"f32", 4}, kindBool: {"bool", 1},
	kindString: {"string", 0}, kindArray: {"array", 0},
	kindU64: {"u64", 8}, kindI64: {"i64", 8}, kindF64: {"f64", 8},
}

func (k kind) known() bool { return int64(k) < int64(len(kinds)) }

func (k kind) size() uint64 { return kinds[k].size }

func (k kind) String() string {
	if !k.known() {
		return fmt.Sprintf("value type %d", uint32(k))
	}
	return kinds[k].name
}

func (k kind) signed() bool {
	return k == kindI8 || k == kindI16 || k == kindI32 || k == kindI64
}

func (k kind) integer() bool {
	return k.signed() || k == kindU8 || k == kindU16 || k == kindU32 || k == kindU64
}

// integerOf decodes an integer; ok is false when it is negative.
func (k kind) integerOf(b []byte) (n uint64, ok bool) {
	var word [8]byte
	copy(word[:], b[:k.size()])
	n = binary.LittleEndian.Uint64(word[:])
	sign := uint64(1) << (8*k.size() - 1)
	return n, !k.signed() || n&sign == 0
}

// fits says whether n can be stored as this kind of integer.
func (k kind) fits(n uint64) bool {
	width := 8 * k.size()
	if k.signed() {
		width--
	}
	return width == 64 || n>>width == 0
}

// keptText is the longest string value that is kept for Text.
const keptText = 4 << 10

// value is what is known of a key: a number or a short string itself, of the rest only the place.
type value struct {
	kind  kind
	elem  kind   // of an array
	count uint64 // of an array
	pos   int64  // of the number, of the string's text, or of the array's first element
	size  uint64 // of a string's text
	bits  [8]byte
	text  string
}

func readValue(c *cursor) (value, error) {
	t, err := c.u32()
	if err != nil {
		return value{}, err
	}
	v := value{kind: kind(t), pos: c.pos}
	switch {
	case !v.kind.known():
		return v, fail(ErrMalformed, c.pos-4, "unknown value type %d", t)
	case v.kind == kindString:
		err = v.readText(c)
	case v.kind == kindArray:
		err = v.readArray(c)
	default:
		err = v.readNumber(c)
	}
	return v, err
}

func (v *value) readNumber(c *cursor) error {
	b, err := c.peek(int(v.kind.size()))
	if err != nil {
		return err
	}
	copy(v.bits[:], b)
	return c.skip(v.kind.size())
}

func (v *value) readText(c *cursor) error {
	n, err := c.length()
	if err != nil {
		return err
	}
	v.pos, v.size = c.pos, n
	if n <= keptText {
		b, err := c.peek(int(n))
		if err != nil {
			return err
		}
		v.text = string(b)
	}
	return c.skip(n)
}

func (v *value) readArray(c *cursor) error {
	t, err := c.u32()
	if err != nil {
		return err
	}
	if v.elem = kind(t); !v.elem.known() {
		return fail(ErrMalformed, c.pos-4, "array of unknown value type %d", t)
	}
	if v.elem == kindArray {
		return fail(ErrUnsupported, c.pos-4, "array of arrays")
	}
	if v.count, err = c.u64(); err != nil {
		return err
	}
	v.pos = c.pos
	least := v.elem.size()
	if v.elem == kindString {
		least = 8
	}
	if v.count > c.left()/least {
		return fail(ErrTruncated, c.pos, "array of %d elements, %d bytes are left in the file", v.count, c.left())
	}
	if v.elem == kindString {
		return skipTexts(c, v.count)
	}
	return c.skip(v.count * least)
}

func skipTexts(c *cursor, count uint64) error {
	for i := range count {
		n, err := c.length()
		if err != nil {
			return within(err, "element %d", i)
		}
		if err := c.skip(n); err != nil {
			return within(err, "element %d", i)
		}
	}
	return nil
}
