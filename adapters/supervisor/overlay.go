package supervisor

import (
	"cmp"
	"slices"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/session"
	"github.com/kvshield/kvshield/internal/gguf"
)

// worthSharing is the least that is taken from the original instead of being copied, in bytes: every range costs the
// engine's process a mapping.
const worthSharing = 128 << 10

// share divides what the enclave left to the host into whole pages that the engine takes from the original itself, by file,
// and the rest, which has to be copied. Most of a model is the former: it costs neither memory nor time.
func share(copies []enclave.Copy, files int) (overlays [][]session.Range, rest []enclave.Copy) {
	overlays = make([][]session.Range, files)
	largestFirst := slices.SortedFunc(slices.Values(copies), func(a, b enclave.Copy) int { return cmp.Compare(b.Length, a.Length) })
	for _, c := range largestFirst {
		from, to := roundUp(c.To), (c.To+c.Length)/gguf.PageMax*gguf.PageMax
		if (c.To-c.From)%gguf.PageMax != 0 || to-from < worthSharing || len(overlays[c.File]) == session.OverlayMax {
			rest = append(rest, c)
			continue
		}
		shift := c.From - c.To
		overlays[c.File] = append(overlays[c.File], session.Range{From: uint64(from + shift), To: uint64(from), Length: uint64(to - from)})
		rest = append(rest, enclave.Copy{File: c.File, From: c.From, To: c.To, Length: from - c.To},
			enclave.Copy{File: c.File, From: to + shift, To: to, Length: c.To + c.Length - to})
	}
	for _, list := range overlays {
		slices.SortFunc(list, func(a, b session.Range) int { return cmp.Compare(a.To, b.To) })
	}
	return overlays, rest
}

func roundUp(n int64) int64 { return (n + gguf.PageMax - 1) / gguf.PageMax * gguf.PageMax }
