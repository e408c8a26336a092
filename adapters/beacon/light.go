package beacon

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/kvshield/kvshield/adapters/supervisor"
)

// Light answers for a supervisor's run until ctx ends.
func Light(ctx context.Context, mode string, s *supervisor.Supervisor) error {
	report, err := s.Attest(ctx, nil)
	if err != nil {
		return err
	}
	return serve(ctx, s.RuntimeDir().Root(), func() Answer {
		n, e := s.Totals(), s.Events()
		return Answer{Mode: mode, Backend: report.Backend, Hardware: report.Hardware, Statement: report.Statement, Enclave: s.EnclavePID() != 0,
			Transitions: n.Transitions, Bytes: n.Bytes, Shielded: e.Shielded, Refused: len(e.Refusals), Ended: len(e.Fatal)}
	})
}

// serve answers on a socket in the runtime directory until ctx ends.
func serve(ctx context.Context, dir string, answer func() Answer) error {
	l, err := net.Listen("unix", filepath.Join(dir, socketName))
	if err != nil {
		return fmt.Errorf("cannot open the status socket: %w", err)
	}
	context.AfterFunc(ctx, func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(within))
				json.NewEncoder(c).Encode(answer())
			}()
		}
	}()
	return nil
}
