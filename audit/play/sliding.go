package play

import (
	"io"

	"github.com/kvshield/kvshield/internal/gguf"
)

const windowKey = ".attention.sliding_window"

// periods are after how many layers one without a window comes, where the model's file does not say (llama.cpp's own defaults).
var periods = map[string]int{"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "olmo2": 4}

// windows are those of architectures whose files need not state one.
var windows = map[string]uint64{"gemma2": 4096}

// sliding says which layers have a window and a cache of their own; nil when none has.
func sliding(r io.ReaderAt, f *gguf.File, arch string, layers int) []bool {
	window, stated, _ := f.Uint(arch + windowKey)
	if !stated {
		window = windows[arch]
	}
	if window == 0 || layers > 1<<16 {
		return nil
	}
	pattern, _, _ := f.Uints(r, arch+".attention.sliding_window_pattern")
	period := periods[arch]
	if len(pattern) == 1 {
		period = int(min(pattern[0], 1<<16))
	}
	list, any := make([]bool, layers), false
	for i := range list {
		if len(pattern) > 1 {
			list[i] = pattern[i%len(pattern)] != 0
		} else {
			list[i] = period > 1 && i%period < period-1
		}
		any = any || list[i]
	}
	if !any {
		return nil
	}
	return list
}
