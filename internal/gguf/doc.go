// Package gguf reads the descriptions in GGUF model files, writes new headers for them, and builds
// small files.
//
// Call [Open] (or [Parse], for anything that can be read at an offset) first. The [File] it returns
// answers for keys and tensors without touching the file again; only [File.Uints] reads an array on
// demand. [WriteHeader] writes the header of a file with the same keys and other tensors,
// and a [Builder] makes a file from nothing.
//
// Limits: GGUF versions 2 and 3, little-endian. Arrays of arrays, and tensors that do not follow one
// another in the order of their descriptions, are refused, as the engines refuse them; so are headers
// above 128 MiB. A string value above 4 KiB is copied by WriteHeader but not kept for [File.Text].
// Tensor data is never read. A file that is changed while it is used may yield a header that differs
// from what was parsed.
//
// Promises: hostile input yields an [*Error], never a panic; memory stays within a small multiple of
// the bytes that are really in the header, whatever its counts claim; and every file that Parse
// accepts has tensors that lie inside it, aligned, and apart from one another.
package gguf
