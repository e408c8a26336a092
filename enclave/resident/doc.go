// Package resident keeps the KV cache of engines in the enclave and computes attention over it there (mode resident). The
// engine's own cache holds zeros, so there is nothing in it to read, permuted or not.
//
// Start with [New], one for the process; [Resident.OpenStore] gives each engine process its store. A store declares the layers of
// a context, takes a batch at a time (which cells the tokens belong to, who sees what), and answers each layer's attention.
//
// Limits: keys and values are rounded as a stock engine's cache would round them, no better. Masks and the numbers of cells are in
// ordinary memory: the engine made them. What an engine asks is answered, so an engine that was taken over can read
// attention over its own caches, though never over those of another engine. The key of a sealed state lies in ordinary
// memory while the state is written or read (the standard library's AES has it there); the key it is derived from does not.
//
// Promises: keys, values and the text of saved states lie in memory of package secmem, and are zeroed before it is given back. A
// store never reaches another store's cells. A cell that was cleared, dropped or released is zero, and showing it is an error.
// No argument makes a call panic, hang, or take more memory than was reserved, besides masks (1 GiB each at most).
package resident
