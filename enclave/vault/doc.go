// Package vault keeps the keys and permutations of loaded models. It implements the contract of
// package enclave: [enclave.Loader] and [enclave.Inverter].
//
// Start with [New]; [Vault.Load] makes a shielded model, [Vault.Invert] undoes its permutation row
// by row, [Vault.Unload] ends it.
//
// Limits: the root key of a load is wiped when Load returns, because nothing needs it afterwards;
// what lives on until Unload is one table per layer that inverts the permutation, two bytes for each float of a
// row. Memory beyond the outputs and those tables is at most 32 MiB for the copying, whatever the size of
// the model. The caller does the copies that Load returns, and answers for a source that changes
// before they are done.
//
// Promises: safe for concurrent use. Invert allocates nothing and waits for nobody; Unload waits
// for running Inverts before it wipes. A Load that fails leaves its outputs empty. Files are
// [enclave.InvalidError] when they are unreadable, broken, or change while they are read, and
// [enclave.RefusedError] when they are sound and not supported.
package vault
