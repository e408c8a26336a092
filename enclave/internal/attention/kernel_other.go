//go:build !cgo || !(amd64 || arm64)

package attention

// kernels returns the portable kernel alone: this build has no C.
func kernels() []*kernel { return []*kernel{&portable} }
