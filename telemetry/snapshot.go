package telemetry

import (
	"time"

	"github.com/kvshield/kvshield/telemetry/page"
)

// snapshot is how things stand, for the page.
func (t *Telemetry) snapshot() page.Snapshot {
	s := t.c.State()
	p := page.Snapshot{Time: time.Now(), Mode: t.c.Mode, TEE: s.TEE, Hardware: s.Hardware, Statement: s.Statement, Model: t.c.Model, Ready: s.Ready, Reason: s.Reason}
	p.Requests = page.Requests{Active: int(t.active.Load()), Queued: int(t.queued.Load()), Total: t.total.Load(), Failed: t.failed.Load()}
	p.Tokens.Total, p.Tokens.Rate = t.window.Decoded()
	p.Share, p.Layers, p.Errors = t.window.Share(), t.window.Layers(), t.c.Errors.List()
	p.Transition, p.TransitionRate, p.BytesRate = t.window.Transitions()
	return p
}
