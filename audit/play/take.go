package play

import (
	"context"
	"fmt"
	"os"

	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/audit/slotfile"
)

// evidence is what was taken from one mode's engine.
type evidence struct {
	mode, tee string
	snapshots []*audit.Snapshot
	other     *audit.Snapshot
	scans     []scanned
	truth     []int32
	pieces    []string
	weights   [][]byte // rows of layer 0's value matrix in the engine's memory
	clear     []string
	notes     []string
}

// take plays both conversations on an engine of one mode and takes the snapshots.
func (p *player) take(ctx context.Context, mode string) (*evidence, error) {
	e := &evidence{mode: mode}
	shield, tee, err := p.NewShield(mode)
	if err != nil {
		return nil, err
	}
	defer shield.Close()
	e.tee = tee
	dir, err := p.scratch()
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	done := p.Progress(fmt.Sprintf("mode %s: starting the engine", mode))
	c, err := launch(ctx, p.config(shield.Environment(os.Environ())), dir)
	done()
	if err != nil {
		return nil, err
	}
	defer c.close()
	if p.engine == "" {
		p.engine = c.version(ctx)
	}
	return e, p.snap(ctx, c, shield, e)
}

func (c *client) version(ctx context.Context) string {
	var props struct {
		BuildInfo string `json:"build_info"`
	}
	if c.get(ctx, "/props", &props) != nil || props.BuildInfo == "" {
		return "llama-server"
	}
	return "llama-server " + props.BuildInfo
}

func (p *player) snap(ctx context.Context, c *client, shield Shield, e *evidence) error {
	room := p.context - 8
	done := p.Progress(fmt.Sprintf("mode %s: playing another conversation, for the control", e.mode))
	before, _, err := c.say(ctx, other(), room)
	done()
	if err != nil {
		return err
	}
	control, err := p.saved(ctx, c, shield, before)
	if err != nil {
		return err
	}
	e.other = control.Snapshot

	done = p.Progress(fmt.Sprintf("mode %s: playing the conversation", e.mode))
	said, cut, err := c.say(ctx, p.Talk, room)
	done()
	if err != nil {
		return err
	}
	if cut {
		e.notes = append(e.notes, fmt.Sprintf("the conversation is longer than the context of %d tokens and was cut", p.context))
	}
	f, err := p.saved(ctx, c, shield, said)
	if err != nil {
		return err
	}
	n := min(len(said), f.Snapshot.Tokens())
	e.truth, e.snapshots = said[:n], []*audit.Snapshot{f.Snapshot.First(n)}
	if e.pieces, err = c.pieces(ctx, e.truth); err != nil {
		return err
	}
	if p.shape.Sliding == nil {
		e.clear = append(e.clear, inClear(f, e.truth))
	}
	return p.inside(ctx, c, shield, f, e)
}

// saved is the slot file of a conversation. That of a model with sliding windows has no more than the window of some layers: then the
// live cache stands for it.
func (p *player) saved(ctx context.Context, c *client, shield Shield, said []int32) (*slotfile.File, error) {
	if p.shape.Sliding == nil {
		return c.slot(ctx, p.shape, len(said))
	}
	p.note("slot files were not attacked: of layers with a sliding window they hold the window only")
	d, err := dump(ctx, c, shield, said)
	if err != nil {
		return nil, err
	}
	s, err := d.Snapshot(p.shape.Layers, p.shape.HeadsKV)
	if err != nil {
		return nil, err
	}
	return &slotfile.File{Snapshot: s.First(min(s.Tokens(), len(said)))}, nil
}

// inClear says which tokens the slot file carries beside the cache.
func inClear(f *slotfile.File, truth []int32) string {
	if f.Sealed > 0 {
		return fmt.Sprintf("the slot file is sealed by the enclave: of its %d bytes none is a token id, a key or a value in clear; the attacks were run on the ciphertext", f.Sealed)
	}
	same := 0
	for i, t := range truth {
		if i < len(f.Tokens) && f.Tokens[i] == t {
			same++
		}
	}
	return fmt.Sprintf("the slot file carries %d of %d token ids in clear, beside the cache", same, len(truth))
}
