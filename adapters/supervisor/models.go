package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/session"
	"github.com/kvshield/kvshield/internal/gguf"
	"github.com/kvshield/kvshield/plugin"
)

// modelSet is a shielded model: one memory file for each of its files, until the engine has taken them.
type modelSet struct {
	id        enclave.ModelID
	opened    session.Opened
	paths     []string // of the originals, absolute or as the engine names them
	files     []*os.File
	originals []os.FileInfo
	overlays  [][]session.Range // by file: what the engine takes from the original
}

// take hands out the shielded file that stands for the original at path, once.
func (m *modelSet) take(path string, original *os.File) (session.Opened, *os.File, error) {
	opened := m.opened
	for i, p := range m.paths {
		f := m.files[i]
		if f == nil || filepath.Clean(p) != filepath.Clean(path) {
			continue
		}
		if info, err := original.Stat(); err != nil || !os.SameFile(info, m.originals[i]) {
			return opened, nil, fmt.Errorf("%s was replaced while its model was loaded; load it again", filepath.Base(path))
		}
		m.files[i] = nil
		opened.Overlay = m.overlays[i]
		return opened, f, nil
	}
	return opened, nil, errNotOfSet
}

var errNotOfSet = errors.New("that file is not part of this model")

func (m *modelSet) discard() {
	for i, f := range m.files {
		if f != nil {
			f.Close()
			m.files[i] = nil
		}
	}
}

// modelPath is a path as an engine names it, and the directory that it starts from where it is relative.
type modelPath struct{ name, dir string }

func (m modelPath) resolve(p string) string {
	if filepath.IsAbs(p) || m.dir == "" {
		return p
	}
	return m.dir + "/" + p // not filepath.Join: it would take ".." back out of the link that dir is
}

// openModel opens a model by path, saying what is wrong with what is no model.
func openModel(path string) (*os.File, error) {
	f, _, err := gguf.Open(path)
	if err != nil {
		return nil, &enclave.InvalidError{Reason: err.Error()}
	}
	return f, nil
}

func splitPaths(path string, g *gguf.File) ([]string, error) {
	n, found, err := g.Uint("split.count")
	if err != nil || (found && n > 4096) {
		return nil, enclave.Invalid("split.count is not a sensible number")
	}
	if !found || n <= 1 {
		return []string{path}, nil
	}
	paths, err := gguf.SplitPaths(path, int(n))
	if err != nil {
		return nil, enclave.Invalid("%v", err)
	}
	return paths, nil
}

// loadSet has the enclave shield the model that an engine is opening. It returns nil for a file that the engine may
// open as it is.
func loadSet(ctx context.Context, c *plugin.Client, path modelPath, model *os.File) (*modelSet, error) {
	sources, paths, err := openSources(path, model)
	defer closeAll(sources)
	if err != nil {
		return nil, err
	}
	outputs, err := memoryFiles(len(sources))
	if err != nil {
		return nil, err
	}
	res, overlays, err := shield(ctx, c, sources, outputs)
	if err != nil || res.Action == enclave.Pass {
		closeAll(outputs)
		return nil, err
	}
	originals, err := stats(sources)
	if err != nil {
		closeAll(outputs)
		return nil, err
	}
	return &modelSet{id: res.ID, paths: paths, files: outputs, originals: originals, overlays: overlays, opened: session.Opened{Shield: true, Model: uint32(res.ID),
		Layers: uint32(res.Layers), RowFloats: uint32(res.RowFloats),
		RotaryDim: uint32(res.RotaryDim), RotaryBase: res.RotaryBase, Marker: res.Marker, Fingerprint: res.Fingerprint, Pairs: res.Pairs, FixedHeads: res.FixedHeads}}, nil
}

// shield has the enclave write the shielded model to outputs and completes and seals them.
func shield(ctx context.Context, c *plugin.Client, sources, outputs []*os.File) (enclave.LoadResult, [][]session.Range, error) {
	paths, release, err := c.Lend(ctx, append(append([]*os.File{}, sources...), outputs...)...)
	if err != nil {
		return enclave.LoadResult{}, nil, err
	}
	defer release()
	req := enclave.LoadRequest{Sources: paths[:len(sources)], Outputs: paths[len(sources):]}
	model, err := c.Inspect(ctx, req.Sources)
	if err != nil || model.Action == enclave.Pass {
		return enclave.LoadResult{Model: model}, nil, err
	}
	if err := enoughMemory(model.ShieldBytes); err != nil {
		return enclave.LoadResult{}, nil, err
	}
	res, err := c.Load(ctx, req)
	if err != nil {
		return enclave.LoadResult{}, nil, err
	}
	overlays, err := finish(res, sources, outputs)
	if err != nil {
		_ = c.Unload(ctx, res.ID) // the error that matters is the first one
		return enclave.LoadResult{}, nil, err
	}
	return res, overlays, nil
}

func stats(files []*os.File) ([]os.FileInfo, error) {
	var list []os.FileInfo
	for _, f := range files {
		info, err := f.Stat()
		if err != nil {
			return nil, err
		}
		list = append(list, info)
	}
	return list, nil
}

// openSources opens the files of the model. The one that the engine opened is taken from its own descriptor, so that
// what is shielded is what it would have read.
func openSources(path modelPath, model *os.File) (files []*os.File, paths []string, err error) {
	info, err := model.Stat()
	if err != nil {
		return nil, nil, err
	}
	g, err := gguf.Parse(model, info.Size())
	if err != nil {
		return nil, nil, enclave.Invalid("%v", err)
	}
	paths, err = splitPaths(path.name, g)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range paths {
		var f *os.File
		if p == path.name || len(paths) == 1 {
			f, err = duplicate(model)
		} else {
			f, err = openModel(path.resolve(p))
		}
		if err != nil {
			return files, nil, enclave.Invalid("a file of this model cannot be opened: %v", err)
		}
		files = append(files, f)
	}
	return files, paths, nil
}

func duplicate(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

func memoryFiles(n int) ([]*os.File, error) {
	var files []*os.File
	for range n {
		fd, err := unix.MemfdCreate("kvshield-model", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			closeAll(files)
			return nil, fmt.Errorf("cannot make a memory file for the shielded model: %w", err)
		}
		files = append(files, os.NewFile(uintptr(fd), "kvshield-model"))
	}
	return files, nil
}

// enoughMemory refuses a copy that would drive the machine out of memory, before it is begun.
func enoughMemory(need int64) error {
	free, err := availableMemory()
	if err != nil || free >= need {
		return nil // where the kernel does not say, the copy itself will
	}
	return fmt.Errorf("the shielded copy of this model needs %d MiB of memory and %d MiB are available; "+
		"free some, or use a smaller model or quantisation", need>>20, free>>20)
}

// finish copies what the enclave left to the host, except what the engine can take from the original, and seals the outputs
// against any change.
func finish(res enclave.LoadResult, sources, outputs []*os.File) ([][]session.Range, error) {
	if err := checkResult(res, outputs); err != nil {
		return nil, err
	}
	overlays, rest := share(res.Copies, len(outputs))
	if err := copyAll(rest, sources, outputs); err != nil {
		return nil, err
	}
	return overlays, sealAll(res, outputs)
}

func checkResult(res enclave.LoadResult, outputs []*os.File) error {
	if len(res.OutputSizes) != len(outputs) {
		return errors.New("the enclave returned sizes for another number of files")
	}
	for _, c := range res.Copies {
		if c.File < 0 || c.File >= len(outputs) {
			return fmt.Errorf("the enclave returned a copy for file %d of %d", c.File, len(outputs))
		}
	}
	return nil
}

func sealAll(res enclave.LoadResult, outputs []*os.File) error {
	for i, f := range outputs {
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if info.Size() != res.OutputSizes[i] {
			return fmt.Errorf("the shielded model has %d bytes where %d were expected; the model file changed while it was read",
				info.Size(), res.OutputSizes[i])
		}
		seals := unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
		if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
			return fmt.Errorf("cannot seal the shielded model: %w", err)
		}
	}
	return nil
}

// copyAll lets the kernel copy the ranges, on two threads: one is enough for neither end.
func copyAll(copies []enclave.Copy, sources, outputs []*os.File) error {
	var wg sync.WaitGroup
	work := make(chan enclave.Copy)
	failed := make(chan error, 2)
	for range 2 {
		wg.Go(func() {
			var err error
			for c := range work {
				if err == nil {
					err = copyRange(outputs[c.File], c.To, sources[c.File], c.From, c.Length)
				}
			}
			if err != nil {
				failed <- err
			}
		})
	}
	for _, c := range copies {
		for _, part := range pieces(c) {
			work <- part
		}
	}
	close(work)
	wg.Wait()
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

const pieceSize = 32 << 20

func pieces(c enclave.Copy) []enclave.Copy {
	var out []enclave.Copy
	for done := int64(0); done < c.Length; done += pieceSize {
		out = append(out, enclave.Copy{File: c.File, From: c.From + done, To: c.To + done, Length: min(pieceSize, c.Length-done)})
	}
	return out
}

// copyRange copies through a descriptor of its own: sendfile writes at the file's position.
func copyRange(dst *os.File, to int64, src *os.File, from, n int64) error {
	out, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", dst.Fd()), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := out.Seek(to, 0); err != nil {
		return err
	}
	for n > 0 {
		k, err := unix.Sendfile(int(out.Fd()), int(src.Fd()), &from, int(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot copy the model into memory: %w", err)
		}
		if k == 0 {
			return errors.New("the model file became shorter while it was copied")
		}
		n -= int64(k)
	}
	return nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
