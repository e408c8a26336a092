package main

import (
	"fmt"

	"github.com/kvshield/kvshield/internal/gguf"
)

// Token types of the format.
const (
	tokenNormal  int32 = 1
	tokenUnknown int32 = 2
	tokenControl int32 = 3
	tokenByte    int32 = 6
)

// fixedTokens are the three special tokens and one for every byte.
const fixedTokens = 3 + 256

// addVocabulary adds a SentencePiece vocabulary of made-up words. Any text can be tokenised: what no
// piece covers falls back to bytes.
func addVocabulary(b *gguf.Builder, size int) {
	pieces := []string{"<unk>", "<s>", "</s>"}
	types := []int32{tokenUnknown, tokenControl, tokenControl}
	for i := range 256 {
		pieces = append(pieces, fmt.Sprintf("<0x%02X>", i))
		types = append(types, tokenByte)
	}
	scores := make([]float32, len(pieces), size)
	for i := range size - fixedTokens {
		pieces = append(pieces, piece(i))
		types = append(types, tokenNormal)
		scores = append(scores, -float32(i))
	}
	b.Key("tokenizer.ggml.model", "llama")
	b.Key("tokenizer.ggml.pre", "default")
	b.Key("tokenizer.ggml.tokens", pieces)
	b.Key("tokenizer.ggml.scores", scores)
	b.Key("tokenizer.ggml.token_type", types)
	b.Key("tokenizer.ggml.bos_token_id", uint32(1))
	b.Key("tokenizer.ggml.eos_token_id", uint32(2))
	b.Key("tokenizer.ggml.unknown_token_id", uint32(0))
	b.Key("tokenizer.ggml.add_bos_token", true)
}

// piece numbers words: the mark of a space, a, ▁a, b, ▁b … z, ▁z, aa, ▁aa and so on. Every prefix of
// a piece comes before it, so that the tokeniser can merge its way there.
func piece(i int) string {
	const space = "▁"
	word := ""
	for n := (i + 1) / 2; n > 0; n = (n - 1) / 26 {
		word = string(rune('a'+(n-1)%26)) + word
	}
	if i%2 == 0 {
		return space + word
	}
	return word
}
