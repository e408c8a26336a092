package watch

import (
	"io"

	"github.com/kvshield/kvshield/internal/gguf"
)

// dataOffset is where the tensor data of a GGUF file starts. A file that bears the magic but does
// not parse is taken to be tensor data throughout: an engine less strict than our reader may load it.
func dataOffset(r io.ReaderAt, size int64) int64 {
	file, err := gguf.Parse(r, size)
	if err != nil {
		return 0
	}
	return min(file.DataOffset, size)
}
