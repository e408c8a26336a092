// Package watch is the supervisor's eye on its process tree. It ends a process that uses a GGUF
// model without having said hello, because the hook cannot reach it and it would run in the clear.
//
// Start with [New] and run [Watcher.Run] in a goroutine of the supervisor for as long as anything
// of its process tree lives. The supervisor must be a child subreaper (PR_SET_CHILD_SUBREAPER), or
// a process that forks twice leaves the tree before it is seen. [Diagnose] says of a program,
// before it is started, whether the hook will reach it.
//
// A process is ended in one of two cases, both only while Config.Greeted denies it. Let the header
// be everything before the tensor data, as the file itself says.
//
//   - Mapped: its mappings of the file cover more than a tenth of the tensor data (at least 64 KiB,
//     at most half of the data).
//   - Read: while it had the file open, or in the milliseconds before that was seen, it read more
//     than 32 MiB and four headers beyond the header. Readers of metadata stay far below:
//     node-llama-cpp, measured, takes the header in chunks of 4 MiB, each with an open of its own,
//     and so takes a small model whole. A program that carries ggml out of the hook's reach gets
//     the allowance of the first case instead: with it, a small model taken whole is taken to be
//     loaded. Of such a program the reads since its start count too, for a model that its command
//     line names: a small one is read and closed between two looks.
//
// Ollama's server, told by the module that it was built from, may read models in bulk as long as no ggml is in it: it
// copies, checks and hashes what it stores. Mapping one counts as always. Its own engine for other formats is ended at once.
//
// Limits. The watch polls: 1 ms while a process is new or has a model open, 10 ms otherwise (20 ms in
// one that slept), and 5 ms for new processes. A process may run for that long before it is ended,
// and one that opened, read and closed a small file between two looks is seen only by its command
// line. Reads are counted per process, not per file: whatever else a process reads while it has a
// model open counts too. Copying or hashing a model is reading in bulk: do it outside the watched
// tree. Mapping a whole file to look at its header counts as mapped. A model below 32 MiB and four headers, read and not mapped by a program
// without ggml, is not told from its metadata. A model that comes through a pipe or in a format
// other than GGUF is not seen. A process that was forked from a greeted one and has not executed
// anything else counts as greeted: the hook is in it, in the same state. Without the rights to
// inspect a process (a setuid program, watched by an ordinary user) only its command line is left:
// it is ended when that names a model.
//
// Promises: a process is signalled through a pidfd after its start time was checked, so never
// another one that got its number. Processes that vanish or cannot be read never stop the watch.
// Run leaves no goroutine and no descriptor behind.
package watch

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// discoverPoll is how often new processes are looked for. A small engine on a small model was
	// measured to take 10 ms from its start to the model, and 20 ms to its whole answer.
	discoverPoll = 5 * time.Millisecond
	basePoll     = 10 * time.Millisecond
	engagedPoll  = time.Millisecond
	greetedPoll  = 50 * time.Millisecond
	// fullScan is how often a process is looked at although none of its counters moved, fullWalk
	// how often the tree is walked although every number handed out was looked up.
	fullScan = 250 * time.Millisecond
	fullWalk = time.Second
	// A process in which nothing moved for as long as drowsy is polled less thoroughly.
	drowsy     = 2 * time.Second
	asleepScan = time.Second
	// alert is how long after a start, or after the last sign of life, a process is polled closely.
	alert = 500 * time.Millisecond
	// share bounds what one closely polled process costs: a look that took t is not repeated
	// within share*t. Time that a busy machine takes from the watch counts as well, so there is a
	// limit to that.
	share          = 10
	slowestEngaged = 3 * time.Millisecond
)

// Config says what to watch and whom to tell. Root and the functions are required.
type Config struct {
	// Root is the process whose descendants are watched, usually the caller. It is not itself.
	Root int
	// Exempt is true for a process that is left alone, such as the enclave.
	Exempt func(pid int) bool
	// Greeted says whether a process has said hello. It must become false again when the hook's
	// connection ends, or a program that the process executes later is not watched. It is called
	// often and from several goroutines.
	Greeted func(pid int) bool
	// Hook is the path or base name of the preload library.
	Hook string
	// Violated is called after the process was ended, one call at a time, not from Run's goroutine.
	Violated func(Violation)
}

// Watcher watches one process tree. Make it with New; Run it once.
type Watcher struct {
	cfg     Config
	tree    tree
	files   *catalogue
	procs   map[int]*process
	walked  time.Time
	began   bool
	reports sync.WaitGroup
	report  sync.Mutex
}

// New makes a watcher; it does nothing before Run.
func New(cfg Config) *Watcher {
	if cfg.Exempt == nil {
		cfg.Exempt = func(int) bool { return false }
	}
	return &Watcher{cfg: cfg, tree: newTree(cfg.Root), files: newCatalogue(), procs: map[int]*process{}}
}

// Run watches until ctx ends and every violation found until then has been reported.
func (w *Watcher) Run(ctx context.Context) {
	defer w.close()
	for ctx.Err() == nil {
		doze(w.tick(time.Now()))
	}
}

// doze blocks the thread. Hundreds of times in a second, that takes a fraction of what the
// runtime's timers take, which wake other threads as well.
func doze(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&t, nil) // cut short by a signal, the next look comes early
}

func (w *Watcher) close() {
	w.reports.Wait()
	w.files.wait()
	for _, p := range w.procs {
		p.release()
	}
	w.tree.release()
}

// tick looks at every process that is due and returns how long to sleep.
func (w *Watcher) tick(now time.Time) time.Duration {
	w.discover(now)
	wake := next(now, discoverPoll)
	for pid, p := range w.procs {
		if !p.due.After(now) && !w.look(p, now) {
			p.release()
			delete(w.procs, pid)
			// Its number may already belong to a new process of the tree.
			w.walked = time.Time{}
			continue
		}
		if p.due.Before(wake) {
			wake = p.due
		}
	}
	return max(time.Until(wake), engagedPoll/4)
}

// discover finds new processes.
func (w *Watcher) discover(now time.Time) {
	from, to, ok := w.tree.born()
	if !ok || now.Sub(w.walked) >= fullWalk {
		w.walked = now
		for pid, parent := range w.tree.walk() {
			w.add(pid, parent, now)
		}
		if !w.began {
			w.forgive()
		}
		w.began = true
		return
	}
	for pid := from + 1; pid <= to; pid++ {
		parent := parentOf(pid)
		if parent == w.cfg.Root || w.procs[parent] != nil {
			w.add(pid, parent, now)
		}
	}
}

// forgive leaves out of account what was read before the watch began.
func (w *Watcher) forgive() {
	for _, p := range w.procs {
		print, _ := p.fingerprint(false)
		p.readBefore = print.read
	}
}

func (w *Watcher) add(pid, parent int, now time.Time) {
	if w.procs[pid] != nil || pid == w.cfg.Root {
		return
	}
	if p := newProcess(pid, parent, now); p != nil {
		p.exempt = w.cfg.Exempt(pid)
		w.procs[pid] = p
	}
}

// look examines one process and sets when to look again; false when the process is gone.
func (w *Watcher) look(p *process, now time.Time) bool {
	if p.exempt || p.ended || w.cfg.Greeted(p.pid) {
		p.due = next(now, greetedPoll)
		return p.alive()
	}
	print, ok := p.fingerprint(p.asleep(now))
	if !ok {
		return false
	}
	if print != p.print {
		p.print, p.changed = print, now
	} else if !p.stale(now) && !p.undecided {
		p.due = next(now, p.pause(now))
		return true
	}
	w.inspect(p, now)
	p.due = next(now, p.pause(now))
	return true
}

// next puts the looks at all processes on the same beat, so that one wake-up serves many.
func next(now time.Time, pause time.Duration) time.Time {
	return now.Add(pause - time.Duration(now.UnixNano())%pause)
}

func (w *Watcher) inspect(p *process, now time.Time) {
	p.scanned = now
	p.scan(w.files, w.cfg.Hook)
	found := p.judge(w.files)
	p.cost = time.Since(now)
	if found == nil || w.cfg.Greeted(p.pid) || w.isCopy(p) {
		return
	}
	w.end(p, *found)
}

// isCopy says whether the process was forked from a greeted one, or from one that is not watched,
// and has executed nothing since.
func (w *Watcher) isCopy(p *process) bool {
	own, err := readStat(p.pid)
	if err != nil {
		return false
	}
	if p.kin != 0 && p.kin == own.stack {
		return true
	}
	parent, err := readStat(p.parent)
	// Executing a program lays the stack out anew, at a random place.
	if err != nil || own.stack == 0 || parent.stack != own.stack {
		return false
	}
	if p.parent == w.cfg.Root || w.cfg.Exempt(p.parent) || w.cfg.Greeted(p.parent) {
		p.kin = own.stack
	}
	return p.kin != 0
}
