package supervisor

import (
	"context"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/hooks/session"
)

// Dump has the hook of an engine process write what its engine's memory holds (docs/protocol.md, section 5) before the next
// graph with attention that it computes, and returns it, at its start. It waits for that graph. Without Config.Audit the hook refuses:
// session.RefusedError.
func (s *Supervisor) Dump(ctx context.Context, pid int) (*os.File, error) {
	p := s.peer(pid)
	if p == nil {
		return nil, fmt.Errorf("process %d has no hook that could dump it", pid)
	}
	fd, err := unix.MemfdCreate("kvshield-dump", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot make a memory file for a dump: %w", err)
	}
	f := os.NewFile(uintptr(fd), "dump")
	if err := p.Dump(ctx, f); err != nil {
		f.Close()
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (s *Supervisor) peer(pid int) *session.Peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.engines {
		if p.PID == pid {
			return p
		}
	}
	return nil
}
