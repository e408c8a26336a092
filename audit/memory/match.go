package memory

import (
	"encoding/binary"
	"math"
)

// Element types of rows in memory, as [Hit] and [Run] name them.
const (
	F16 = "F16"
	F32 = "F32"
)

// tolerance is the relative distance up to which a row in memory is taken for a row of the dictionary.
const tolerance = 0.02

// signPlace says which bit of a group's byte holds the sign of its number i. The order is the one in which the signs of
// F16 come out of two words with the fewest steps.
var signPlace = [group]int{0, 2, 4, 6, 1, 3, 5, 7}

// signs16 sets dst[i] to the signs of the group of F16 numbers at mem[i*step].
func signs16(dst, mem []byte, step int) {
	const lane = 0x0001000100010001
	for i := range dst {
		w := mem[i*step : i*step+16]
		t := binary.LittleEndian.Uint64(w)>>15&lane | binary.LittleEndian.Uint64(w[8:])>>15&lane<<1
		dst[i] = byte(t | t>>14 | t>>28 | t>>42)
	}
}

// signs32 sets dst[i] to the signs of the group of F32 numbers at mem[i*step].
func signs32(dst, mem []byte, step int) {
	const lane = 0x0000000100000001
	for i := range dst {
		w := mem[i*step : i*step+32]
		t := binary.LittleEndian.Uint64(w)>>31&lane | binary.LittleEndian.Uint64(w[8:])>>31&lane<<4 |
			binary.LittleEndian.Uint64(w[16:])>>31&lane<<1 | binary.LittleEndian.Uint64(w[24:])>>31&lane<<5
		dst[i] = byte(t | t>>30)
	}
}

// distance16 is the square of the distance of the F16 numbers in mem from row, or something above limit (NaN included) as soon as it is
// clear that it will be.
func distance16(mem []byte, row []float32, limit float32) float32 {
	sum := float32(0)
	for i, v := range row {
		d := half(binary.LittleEndian.Uint16(mem[2*i:])) - v
		sum += d * d
		if i%group == group-1 && !(sum <= limit) {
			break
		}
	}
	return sum
}

// distance32 is distance16 for F32 numbers.
func distance32(mem []byte, row []float32, limit float32) float32 {
	sum := float32(0)
	for i, v := range row {
		d := math.Float32frombits(binary.LittleEndian.Uint32(mem[4*i:])) - v
		sum += d * d
		if i%group == group-1 && !(sum <= limit) {
			break
		}
	}
	return sum
}

// half is the value of an IEEE 754 binary16 number.
func half(h uint16) float32 {
	sign, rest := uint32(h>>15)<<31, uint32(h&0x7fff)
	switch {
	case rest >= 0x7c00: // infinite, not a number
		return math.Float32frombits(sign | 0x7f800000 | rest<<13)
	case rest < 0x0400: // subnormal: units of 2^-24
		return math.Float32frombits(sign | math.Float32bits(float32(rest)*(1.0/(1<<24))))
	}
	return math.Float32frombits(sign | (rest<<13 + (127-15)<<23))
}
