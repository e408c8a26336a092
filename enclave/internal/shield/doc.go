// Package shield is what a shielded model is made of: which tensors of an architecture hold queries,
// keys and values, and the algebra that permutes them so that attention stays exact.
//
// Call [Read] first: it turns the parsed files of a model into a [Plan], or says why not. Then
// [Draw] a [Permutation] from a key; [Permutation.Head] says where the rows of a head come from,
// [Permutation.Factors] gives the frequency factors that go with them, and [Permutation.Inverse]
// the table that undoes it all on a layer's attention output.
//
// What is permuted, per model load:
//
//   - key/value heads among themselves, per layer; the query heads of a group move along;
//   - the values inside every key/value head, per layer and head;
//   - the rotary pairs inside the heads of queries and keys, and the two rows of a pair: once for
//     the whole model, because an engine has one set of frequency factors for all layers;
//   - the rows beyond the rotated ones, in the same way but one by one.
//
// What an architecture looks like is the table in table.go; a new one is an entry there and nothing
// in the algebra. Limits: one head count and one rotary base for all layers; no YaRN; every tensor of a layer
// must be known. Promises: what the table does not describe is an [enclave.RefusedError], what is
// broken an [enclave.InvalidError]; permutations are in secret memory and nowhere else.
package shield
