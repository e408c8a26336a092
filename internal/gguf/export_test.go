package gguf

// HeaderEnd is where the padding in front of the data starts.
func HeaderEnd(f *File) int64 { return f.headerEnd }
