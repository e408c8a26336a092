// Package attention keeps one layer's keys and values in secret memory and computes attention over them on the CPU, as a
// stock engine would have done on its accelerator.
//
// Call [NewCache] first, one for each layer and stream, and [NewPool] once. [Cache.Put] stores a cell, [Attend] answers the
// queries of a batch. Cells are the engine's: an index into its cache, in no order. What a query sees is the mask's business
// alone (causality, windows, sequences), so a cell that was overwritten by the engine is overwritten by Put, and a cell that
// the engine forgot stays until it is used again or [Cache.Clear].
//
// Semantics are those of ggml's FLASH_ATTN_EXT (ggml/src/ggml-cpu/ops.cpp): logit = scale·q·k, soft-capped, plus slope·mask,
// then a softmax to whose denominator the head's sink is added; a query that sees nothing gets zeros. ggml's SOFT_MAX agrees
// except there, where it gives NaN. A graph without flash attention soft-caps before it scales: the same for a scale of 1, which is
// what such models use; a caller that finds another one must refuse.
//
// Limits: all of K and V passes through the CPU for every query, so a decode step costs the time to read the cache once.
// Cells are looked at in panels of 32 and a panel is skipped if the mask hides all of it; a query that sees one cell in each
// panel pays for all. Registers and stacks are not wiped.
//
// Promises: keys, values, logits and weights lie in memory of package secmem only, and a page, or the scratch memory of a
// [Pool], is zeroed before it is given back. No argument makes a function read or write outside its slices: what does not fit is
// an error, and so is a result that is not finite. After an error from Attend its output is zero.
package attention
