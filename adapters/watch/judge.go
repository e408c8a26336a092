package watch

import (
	"os"
	"path/filepath"
	"strings"
)

const (
	// metadataSlack is what a reader of metadata may read beyond the header: chunks that reach
	// past it, several readers of one file.
	metadataSlack   = 32 << 20
	metadataHeaders = 4
	// leastLoaded is the least amount of tensor data that counts as loading.
	leastLoaded = 64 << 10
)

// reading is what a process read since it was seen to have a model open.
type reading struct {
	from   int64 // bytes the process had read when the model was first seen open
	before int64 // the same, one look earlier: what was read before the first sight counts from here
	now    int64
	pos    int64 // furthest position seen
	closed bool
}

// least is what was surely read while the file was open. The position alone would also move by
// seeking (engines seek to the end for the size), the counter alone misses what was read before
// the first look: a position counts as far as the process read that much in the meantime.
func (r *reading) least() int64 {
	return max(r.now-r.from, min(r.pos, r.most()))
}

// most includes what was read in the few milliseconds before the first sight, of whatever file. A
// program that reads without moving its position is known by nothing else.
func (r *reading) most() int64 { return r.now - r.before }

// follow brings the readings up to date with the models now open, each with its position. A model
// that was closed stays until it was judged, as what was read until then counts.
func (p *process) follow(open map[*model]int64, judged bool) {
	for m, r := range p.reading {
		if r.closed {
			if judged {
				delete(p.reading, m)
			}
			continue
		}
		r.now = p.print.read
		_, still := open[m]
		r.closed = !still
	}
	for m, pos := range open {
		r := p.reading[m]
		if r == nil {
			r = &reading{from: p.print.read, before: p.readBefore, now: p.print.read}
			p.reading[m] = r
		}
		r.pos, r.closed = max(r.pos, pos), false
	}
	p.readBefore = p.print.read
}

// finding is evidence against a process.
type finding struct {
	model    *model
	evidence string
	cause    Cause // Reachable: to be found out
}

// judge returns the evidence against the process as it was scanned, nil when there is none.
func (p *process) judge(files *catalogue) *finding {
	if p.unreadable {
		return p.judgeClosed()
	}
	if found := p.judgeMLX(files); found != nil {
		return found
	}
	for m, covered := range p.mapped {
		if _, data, known := m.tensors(); known && covered > loading(data) {
			return &finding{model: m, evidence: "has " + bytesText(covered) + " of it mapped"}
		}
	}
	for m, r := range p.reading {
		header, data, known := m.tensors()
		if !known || data == 0 {
			continue
		}
		if read, bulk := p.inBulk(files, r, header, data); bulk && !p.storesModels(files) {
			return &finding{model: m, evidence: "has read " + bytesText(read) + " of it"}
		}
	}
	return p.judgeCommand(files)
}

// loading is how much tensor data in a process's hands counts as the weights.
func loading(data int64) int64 {
	return min(max(leastLoaded, data/10), data/2)
}

// inBulk says how much was read beyond the header and whether that is more than metadata. It asks
// for ggml only when the answer matters, because searching a program for it takes a while.
func (p *process) inBulk(files *catalogue, r *reading, header, data int64) (int64, bool) {
	if read := min(r.most()-header, data); read > metadataSlack+metadataHeaders*header {
		return read, true
	}
	// Readers of metadata take a chunk of some megabytes at a given place (Node), or stop soon after the header (Go). Who has
	// moved through half of a small model is loading it, whatever engine that is.
	if moved := min(r.pos, r.most()) - header; moved > min(data/2, metadataSlack) {
		return min(moved, data), true
	}
	read := min(r.least()-header, data)
	return read, read > loading(data) && p.hasUnhookedGGML(files)
}

// hasUnhookedGGML says whether the process carries ggml where the hook is not or cannot be.
func (p *process) hasUnhookedGGML(files *catalogue) bool {
	for _, o := range p.objects {
		if isGGMLLibrary(o.path) {
			if !p.hooked {
				return true
			}
			continue
		}
		switch files.carriesGGML(p.objectFile(o)) {
		case yes:
			return true
		case unexamined:
			p.undecided = true
		}
	}
	return false
}

// objectFile is a path under which the object can be opened.
func (p *process) objectFile(o object) string {
	if _, err := os.Stat(o.link); err == nil {
		return o.link
	}
	return p.path("root") + o.path
}

// judgeCommand catches what is read and closed between two looks: a program with ggml out of the
// hook's reach that names a model and has read enough since its start.
func (p *process) judgeCommand(files *catalogue) *finding {
	read := p.print.read - p.readByLast
	for _, m := range p.named {
		header, data, known := m.tensors()
		p.undecided = p.undecided || !known
		if known && data > 0 && read > header+loading(data) && p.hasUnhookedGGML(files) && !p.storesModels(files) {
			return &finding{model: m, evidence: "was given it on its command line and has read " + bytesText(read) + " since its start"}
		}
	}
	return nil
}

// judgeClosed is all that can be done about a process whose memory and descriptors are closed to
// the watch (a setuid program, seen by an ordinary user): it must not name a model.
func (p *process) judgeClosed() *finding {
	for _, m := range p.named {
		return &finding{model: m, evidence: "was given it on its command line, cannot be looked into, and goes on"}
	}
	return nil
}

// namedModels returns the models among the arguments, as words or after an equals sign.
func (p *process) namedModels(files *catalogue) []*model {
	text, err := os.ReadFile(p.path("cmdline"))
	if err != nil {
		return nil
	}
	found := []*model{}
	p.arguments = strings.Split(string(text), "\x00")
	for i, argument := range p.arguments {
		if _, value, ok := strings.Cut(argument, "="); ok {
			argument = value
		}
		if i == 0 || argument == "" {
			continue
		}
		if m := files.model(p.absolute(argument)); m != nil {
			found = append(found, m)
		}
	}
	return found
}

// absolute resolves a path as the process would; where its folder is hidden, ours is the likely one.
func (p *process) absolute(path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	folder, err := os.Readlink(p.path("cwd"))
	if err != nil {
		folder, _ = os.Getwd()
	}
	return filepath.Join(folder, path)
}
