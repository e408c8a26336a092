// Package memory searches all memory of an engine's process for the rows of a KV cache, as an attacker does who can read
// that memory and knows the public model, but not where anything lies.
//
// Start with [NewScanner], which takes what layer 0 caches for each token of the vocabulary; [Scanner.Search] searches
// a process, and [Runs] puts what was found together into sequences of tokens.
//
// How: a row is known by the signs of 24 of its numbers. Three such hashes, of different numbers, name candidates for
// every place where a row could begin, so that a number close to zero whose sign came out differently does not hide a
// row; the candidates are compared number by number. A match is nearer than 2 % (relative L2 distance), because
// an engine's arithmetic differs a little between prefill and decode.
//
// Limits: rows lie whole and unscaled in memory, as F16 or F32, little-endian, at multiples of 32 bytes (ggml aligns tensors so),
// or of the largest power of two in the row's own size where that is less. Quantised, transposed, encrypted and permuted rows are
// not found; that is what the audit measures. With noise of 0.5 % about one row in 10,000 is missed, and two in a hundred of rows
// of only 32 numbers, whose hashes share most of them. Of more than 32 rows with the same 24 signs, the lowest 32 are known by
// that hash ([Scanner.Tokens] counts what is left). A process is read while it runs.
//
// Promises: memory that matches nothing, be it zeros, NaN or one value throughout, yields no hit and costs a bounded time, at worst, where
// every place has the signs of 32 rows, some sixty times that of random memory. What could not be read is
// counted, and a process that ends is an error, never a search that found nothing. A scanner takes 12 MiB and 40 bytes for each token
// besides the matrix that it was given; while it scans 0.3 MiB and two rows for each processor, and what the hits take.
package memory
