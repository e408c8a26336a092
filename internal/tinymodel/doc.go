// Package tinymodel makes small models of random weights for every architecture that an engine knows, so that tests meet all of
// them.
//
// Which architectures there are, which keys of metadata and which tensors each of them needs and of what shape is asked of the
// engine: a file is loaded, and what the engine misses in it is added, until it loads ([Engine.Discover]). A [Recipe] is the
// result; [Recipe.Write] makes a GGUF file of it. What an architecture may have and does not need (biases, norms of queries and
// keys, windows) is listed in extras.go: that is the place where another architecture's optional parts are added.
//
// It is for tests: it needs a C compiler and the engine's shared libraries.
package tinymodel
