package gguf

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
)

// maxSplits is what the format's 16-bit count can say and five digits can name.
const maxSplits = 65535

var splitName = regexp.MustCompile(`^(.*)-(\d{5})-of-(\d{5})\.gguf$`)

// SplitPaths names the files of a model that is split into count files, in order. path is any one
// of them, named NAME-00001-of-00003.gguf; a model of one file may have any name. Whether the
// files exist, and belong together, is for the caller to see.
func SplitPaths(path string, count int) ([]string, error) {
	if count < 1 || count > maxSplits {
		return nil, fail(ErrMalformed, 0, "a model of %d files, between 1 and %d are possible", count, maxSplits)
	}
	if count == 1 {
		return []string{path}, nil
	}
	dir, base := filepath.Split(path)
	m := splitName.FindStringSubmatch(base)
	if m == nil {
		return nil, fail(ErrMalformed, 0, "one of %d files is named %.200q, expected NAME-00001-of-%05d.gguf", count, base, count)
	}
	number, _ := strconv.Atoi(m[2])
	named, _ := strconv.Atoi(m[3])
	if named != count || number < 1 || number > count {
		return nil, fail(ErrMalformed, 0, "one of %d files is named as number %d of %d", count, number, named)
	}
	paths := make([]string, count)
	for i := range paths {
		paths[i] = dir + fmt.Sprintf("%s-%05d-of-%05d.gguf", m[1], i+1, count)
	}
	return paths, nil
}
