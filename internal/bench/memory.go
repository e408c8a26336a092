package bench

import (
	"context"
	"os"
	"strconv"
	"time"

	"github.com/kvshield/kvshield/adapters/watch"
)

// memory is what the processes of one measurement held together at the moment of their highest sum, in bytes.
type memory struct {
	engine     int64 // the engine and its children, without the shielded model
	enclave    int64
	supervisor int64 // this process; on the shielded side only
	copy       int64 // the shielded model in memory files, mapped or not
	files      int64 // what of the above is mapped files: page cache that the kernel can take back
	resident   bool  // a process hides its shares, and its whole resident set was counted instead
}

func (m memory) total() int64 { return m.engine + m.enclave + m.supervisor + m.copy }

// Looking takes at most every second moment of one core, and on a small process it is done often enough to catch a short
// peak.
const sampleEvery = time.Millisecond

// measureMemory runs one prefill and one decode for the memory they take.
func (c *Config) measureMemory(ctx context.Context, shield Shield) (memory, error) {
	var peak memory
	s := sampler{shield: shield, blocks: map[uint64]int64{}}
	observe := func(pid int, done <-chan struct{}) {
		for pause := time.Duration(0); ; {
			select {
			case <-done:
				return
			case <-time.After(pause):
			}
			began := time.Now()
			if m := s.sample(pid); m.total() > peak.total() {
				peak = m
			}
			pause = max(sampleEvery, time.Since(began))
		}
	}
	_, err := c.runBench(ctx, shield, observe, "-p", strconv.Itoa(c.Prompt), "-n", strconv.Itoa(c.Generate))
	return peak, err
}

// sampler adds up the memory of one measurement's processes.
type sampler struct {
	shield Shield
	blocks map[uint64]int64 // memory files of shielded models seen so far, by inode: what they hold
}

func (s *sampler) sample(engine int) memory {
	var m memory
	live := map[uint64]int64{}
	add := func(pid int, into *int64) {
		u := readUsage(pid)
		*into += u.held
		m.files += u.files
		m.resident = m.resident || u.resident
		for inode, share := range u.copies {
			live[inode] += share
		}
		if s.shield != nil {
			s.lookAtFiles(pid, live)
		}
	}
	for _, pid := range append(watch.Descendants(engine), engine) {
		add(pid, &m.engine)
	}
	if s.shield != nil {
		add(os.Getpid(), &m.supervisor)
		if pid := s.shield.EnclavePID(); pid != 0 {
			add(pid, &m.enclave)
		}
	}
	for inode, mapped := range live {
		m.copy += max(mapped, s.blocks[inode])
	}
	return m
}

// lookAtFiles notes the memory files that a process holds open: pages of them that nobody has mapped are memory too.
// They are remembered, because an engine closes them and keeps its mapping.
func (s *sampler) lookAtFiles(pid int, live map[uint64]int64) {
	for inode, bytes := range openCopies(pid) {
		live[inode] += 0
		s.blocks[inode] = max(s.blocks[inode], bytes)
	}
}
