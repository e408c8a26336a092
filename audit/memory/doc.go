// Package memory searches all memory of an engine's process for the rows of a KV cache, as an attacker does who can read
// that memory and knows the public model, but not where anything lies.
//
// Start with [NewScanner], which takes what layer 0 caches for each token of the vocabulary; [Scanner.Process] searches
// a process, and [Runs] puts what was found together into sequences of tokens.
//
// How: a row is known by the signs of 24 of its numbers. Three such hashes, of different numbers, name candidates for
// every place where a row could begin, so that a number close to zero whose sign came out differently does not hide a
// row; the candidates are compared number by number. A match is nearer than 2 % (relative L2 distance), because
// an engine's arithmetic differs a little between prefill and decode.
//
// Limits: rows lie whole and unscaled in memory, as F16 or F32, at multiples of 32 bytes (ggml aligns tensors so) and
// of the row's own size where that is no multiple of 32. Quantised, transposed, encrypted and permuted rows are not found; that
// is what the audit measures. Of more than 32 rows with the same 24 signs, the lowest 32 are known by that hash.
//
// Promises: memory that matches nothing, be it zeros, NaN or one value throughout, costs a bounded time and yields no hit;
// a scanner takes 12 MiB and 40 bytes for each token besides the matrix that it was given, and while it scans 0.4 MiB for each
// processor.
package memory
