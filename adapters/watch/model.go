package watch

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	magic = "GGUF"
	// smallest is the least a GGUF file can be: magic, version and two counts.
	smallest = 24
	// remembered bounds the catalogue: past it everything is forgotten and looked at anew.
	remembered = 4096
)

// model is a GGUF file, whatever its name.
type model struct {
	name string
	size int64
	// data is where the tensor data starts; negative until the header has been read.
	data atomic.Int64
}

// tensors returns the offset and the size of the tensor data, false while they are not known.
func (m *model) tensors() (offset, length int64, known bool) {
	offset = m.data.Load()
	return offset, m.size - offset, offset >= 0
}

// fileStamp names one state of a file.
type fileStamp struct {
	dev, inode   uint64
	size         int64
	seconds, nsc int64
}

func stampOf(st *unix.Stat_t) fileStamp {
	return fileStamp{uint64(st.Dev), st.Ino, st.Size, int64(st.Mtim.Sec), int64(st.Mtim.Nsec)}
}

// catalogue remembers what files are, so that each is opened once. What takes long is found out
// in the background: a look at a process must not wait for it.
type catalogue struct {
	work sync.WaitGroup
	// models and ggml belong to the goroutine that polls. A nil model is another kind of file.
	models   map[fileStamp]*model
	ggml     answers
	ollama   answers
	embedded answers
}

func newCatalogue() *catalogue {
	return &catalogue{models: map[fileStamp]*model{}, ggml: answers{}, ollama: answers{}, embedded: answers{}}
}

func (c *catalogue) wait() { c.work.Wait() }

// model returns the GGUF file at a path, nil when it is none or cannot be read.
func (c *catalogue) model(path string) *model {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size < smallest {
		return nil
	}
	stamp := stampOf(&st)
	if m, known := c.models[stamp]; known {
		return m
	}
	f, err := openRegular(path, stamp)
	if err != nil {
		return nil
	}
	if len(c.models) >= remembered {
		clear(c.models)
	}
	m := c.identify(f, path, st.Size)
	c.models[stamp] = m
	return m
}

// identify takes the file over.
func (c *catalogue) identify(f *os.File, path string, size int64) *model {
	var start [len(magic)]byte
	if _, err := f.ReadAt(start[:], 0); err != nil || string(start[:]) != magic {
		f.Close()
		return nil
	}
	m := &model{name: linkTarget(path), size: size}
	m.data.Store(-1)
	c.work.Go(func() {
		defer f.Close()
		m.data.Store(dataOffset(f, size))
	})
	return m
}

// openRegular opens a file without side effects on what the path may have become meanwhile: a
// pipe or a device is not opened.
func openRegular(path string, want fileStamp) (*os.File, error) {
	handle, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(handle)
	var st unix.Stat_t
	if err := unix.Fstat(handle, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || stampOf(&st) != want {
		return nil, fmt.Errorf("%s changed while it was looked at", path)
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", handle), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

func linkTarget(path string) string {
	if target, err := os.Readlink(path); err == nil {
		return target
	}
	return path
}

// States of what is asked about a program's or a library's content.
const (
	unexamined int32 = iota
	no
	yes
)

// answers remembers what was found out about files.
type answers map[fileStamp]*atomic.Int32

// ask examines a program or library once. The first question about a file starts that, and is answered with unexamined.
func (c *catalogue) ask(known answers, path string, examine func(*os.File) bool) int32 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return no
	}
	stamp := stampOf(&st)
	if answer, found := known[stamp]; found {
		return answer.Load()
	}
	f, err := openRegular(path, stamp)
	if err != nil {
		return no
	}
	if len(known) >= remembered {
		clear(known)
	}
	answer := &atomic.Int32{}
	known[stamp] = answer
	c.work.Go(func() {
		defer f.Close()
		if examine(f) {
			answer.Store(yes)
		} else {
			answer.Store(no)
		}
	})
	return unexamined
}

// carriesGGML says whether ggml's code lies inside a program or library.
func (c *catalogue) carriesGGML(path string) int32 {
	return c.ask(c.ggml, path, func(f *os.File) bool { return embedsGGML(f) })
}

// isOllama says whether a program is Ollama.
func (c *catalogue) isOllama(path string) int32 { return c.ask(c.ollama, path, builtFrom(ollamaPath)) }

// isEmbedded says whether a program is kvshield-ollama.
func (c *catalogue) isEmbedded(path string) int32 {
	return c.ask(c.embedded, path, builtFrom(embeddedPath))
}
